"""The memory and traffic of each process of a large run, by the planner: counted, nothing is run or timed.

    python -m bench.runs.scaling --json bench/results/scaling.json

Llama-3.1-8B as the policy, its teacher and reference on disk, four pairs of two responses of 1,024 tokens per process
and step, bfloat16 products over float32 weights, blocks recomputed; from 8 to 1,024 processes, sharded over all, in
replicas of 8 and of 64, head gathered and shared.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.harness.machine import made_by, write_report
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.distributed.parallel_config import ParallelConfig
from tvkd_fast.models import model_shape
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.planning.footprint import Footprint, PairTokens
from tvkd_fast.training.train_config import TrainConfig

POLICY = "meta-llama/Llama-3.1-8B-Instruct"
PAIRS, TOKENS = 4, 2048
"""Pairs of a process and step, and tokens of a pair."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = model_shape(POLICY)
    rows = []
    for processes in (8, 64, 256, 1024):
        for group in sorted({8, 64, processes}):
            if group > processes:
                continue
            for vocabulary in ("gathered", "shared"):
                rows.append(_row(shape, processes, group, vocabulary))
                print(rows[-1])
    report = {
        "rows": rows,
        "policy": POLICY,
        "pairs": PAIRS,
        "tokens": TOKENS,
        "made_by": made_by(),
    }
    write_report(report, arguments.json)


def _row(shape: Any, processes: int, group: int, vocabulary: Any) -> dict[str, Any]:
    config = TrainConfig(
        policy=POLICY,
        output_dir="never written",
        scores="never read",
        data=DataConfig(train="never read", max_length=TOKENS // 2),
        model=ModelConfig(autocast="bfloat16", activation_checkpointing="full"),
        parallel=ParallelConfig(replicas=processes // group, vocabulary=vocabulary),
        pairs_per_step=PAIRS * processes,
        tokens_per_micro_batch=PAIRS * TOKENS,
    )
    found = Footprint(config, shape, None, PairTokens(0, TOKENS / 2, TOKENS / 2, TOKENS / 2), processes)
    moment, held = found.memory()
    sent = found.communication()
    return {
        "processes": processes,
        "group": group,
        "vocabulary": vocabulary,
        "held_gib": sum(held.values()) / 2**30,
        "moment": moment,
        "sent_gib": sum(sent.values()) / 2**30,
        "flops_per_byte": found.arithmetic() / processes / sum(sent.values()),
    }


if __name__ == "__main__":
    main()
