"""Dense columns on real states: how many entries they hold, and how many entries too many are selected beside them.

    python -m bench.head.dense_columns --data PAIRS.jsonl.gz --json FILE

Counted in torch as `kernels/selection_bits.py` selects: beside the dense columns' sum, a split of 4 tiles of 256
columns has its own sum so far. No timing. Letters: N tokens, V vocabulary, K dense columns, R rows that are looked at.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.machine import made_by, write_report
from bench.harness.states import load_states
from bench.head.comparison import prepared_states
from tvkd_fast.kernels.dense_columns import SAMPLE_ROWS, rank

TILE, SPLIT_TILES = 256, 4
LOG_EPS = (14, 16)
EVERY = 16


def orders(labels: Tensor, logits: Tensor, log_eps: int) -> dict[str, Tensor]:
    """Columns in the order in which a rule takes them as dense; logits [SAMPLE_ROWS, V]."""
    vocab = logits.shape[1]
    selected = (logits.log_softmax(1) >= -log_eps * math.log(2)).sum(0)
    present = torch.zeros(vocab, dtype=torch.int64).index_fill_(0, labels, 1)
    none = torch.zeros_like(present)
    rules = {
        "labels, then the sample": (present, selected),
        "the sample alone": (none, selected),
        "labels, then the first": (present, none),
    }
    return {rule: rank(*counts).argsort(descending=True) for rule, counts in rules.items()}


def counted(z: Tensor, dense: Tensor, log_eps: int) -> dict[str, float]:
    """The share of the entries of z [R, V] that dense columns hold, and entries selected over true ones."""
    true = z.log_softmax(1) >= -log_eps * math.log(2)
    split = TILE * SPLIT_TILES
    padded = torch.nn.functional.pad(z, (0, -z.shape[1] % split), value=-math.inf).view(len(z), -1, SPLIT_TILES, TILE)
    so_far = padded.logsumexp(3).logcumsumexp(2).maximum(z[:, dense].logsumexp(1)[:, None, None])
    limit = so_far.repeat_interleave(TILE, 2).view(len(z), -1)[:, : z.shape[1]] - log_eps * math.log(2)
    selected = z >= limit
    others = torch.ones(z.shape[1], dtype=torch.bool).index_fill_(0, dense, False)
    total, outside = float(true.sum()), float(true[:, others].sum())
    return {"held": 1 - outside / total, "marked": (total - outside + float(selected[:, others].sum())) / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bundled:train")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    states = load_states(prepared_states((4096, 576, 49152), model=arguments.model, data=arguments.data))
    n = len(states.hidden)
    sample = states.hidden[torch.arange(SAMPLE_ROWS) * n // SAMPLE_ROWS] @ states.weight.T
    z = states.hidden[3::EVERY] @ states.weight.T
    rows: list[dict[str, Any]] = []
    for log_eps in LOG_EPS:
        for rule, order in orders(states.labels, sample, log_eps).items():
            for k in (1024, 2048, 4096, 8192):
                rows.append({"rule": rule, "k": k, "log_eps": log_eps} | counted(z, order[:k], log_eps))
                print(json.dumps(rows[-1]), flush=True)
    report = {"rows": rows, "looked_at": len(z), "tokens": n, "states": states.source, "made_by": made_by()}
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
