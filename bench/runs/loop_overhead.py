"""The overhead of the training loop over a step written by hand: the same tiny policy, pairs and optimizer, in turns.

    python -m bench.runs.loop_overhead --steps 300 --json bench/results/loop_overhead.json

Every step of the trainer (collation, learning rate, checks, metrics, the line in metrics.jsonl) is followed by a bare
one over a twin: forward, loss, backward, clipping, update, on tensors that lie ready. The difference is taken step by
step, and its median given with a 95% interval from resampling.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils import clip_grad_norm_

from bench.harness.machine import made_by, write_report
from bench.runs.soak import make_models
from tvkd_fast.commands.models import load_policy
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.commands.train import train
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.losses import segment_sums
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.training import trainer
from tvkd_fast.training.optim import make_optimizer
from tvkd_fast.training.step import StepOutput
from tvkd_fast.training.train_config import TrainConfig

SETTLING = 20
"""Steps at the start that are not looked at."""


class Turns:
    """Stands in for `train_step`: takes it, then the bare one, and keeps the times of both."""

    def __init__(self, config: TrainConfig) -> None:
        self.real = trainer.train_step
        self.policy = load_policy(config.policy, config.model)
        self.policy.train()
        self.optimizer = make_optimizer(self.policy, config.optim)
        self.loop: list[float] = []
        self.bare: list[float] = []
        self._since: float | None = None

    def __call__(self, policy: Any, scorer: Any, batches: Any, *arguments: Any, **options: Any) -> StepOutput:
        start = time.perf_counter()
        if self._since is not None:
            # From the end of the last bare step to here: what the loop does around its own.
            self.loop[-1] += start - self._since
        out = self.real(policy, scorer, batches, *arguments, **options)
        self.loop.append(time.perf_counter() - start)
        ready = [(batch, scorer.of(batch).ref_logps) for batch in batches]
        start = time.perf_counter()
        self._step(ready)
        self._since = time.perf_counter()
        self.bare.append(self._since - start)
        return out

    def _step(self, ready: list[tuple[Any, torch.Tensor]]) -> None:
        pairs = sum(batch.num_pairs for batch, _ in ready)
        for batch, ref_logps in ready:
            chosen, rejected = (segment_sums(self.policy(batch), batch.cu_seqlens) - ref_logps).chunk(2)
            (-logsigmoid(0.1 * (chosen - rejected)).sum() / pairs).backward()
        clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def interval(differences: list[float], draws: int = 2000) -> tuple[float, float]:
    """95% of the medians of resampled differences."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(differences, k=len(differences))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        make_models(Path(folder))
        config = TrainConfig(
            policy=f"{folder}/policy",
            output_dir=f"{folder}/run",
            objective="dpo",
            data=DataConfig(train=f"{folder}/pairs.jsonl"),
            model=ModelConfig(),
            max_steps=arguments.steps + SETTLING,
            pairs_per_step=8,
            save_every=-1,
        )
        # In a cache, as a run that is long enough to matter has it.
        score(ScoreConfig(output_dir=f"{folder}/scores", policy=config.policy, data=config.data))
        config.scores = f"{folder}/scores"
        turns = Turns(config)
        trainer.train_step = turns
        train(config, show_progress=False)
    # The last one's share of the loop ends with the run.
    pairs = list(zip(turns.loop, turns.bare, strict=True))[SETTLING:-1]
    differences = [loop - bare for loop, bare in pairs]
    low, high = interval(differences)
    report: dict[str, Any] = {
        "steps": len(pairs),
        "loop_ms": 1e3 * median(loop for loop, _ in pairs),
        "bare_ms": 1e3 * median(bare for _, bare in pairs),
        "overhead_ms": 1e3 * median(differences),
        "interval_ms": [1e3 * low, 1e3 * high],
        "made_by": made_by(),
    }
    report["goal_ms"] = 3 + 0.01 * report["bare_ms"]
    print({name: value for name, value in report.items() if name != "made_by"})
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
