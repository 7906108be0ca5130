"""A step that was not finite, once more and pair by pair: `tvkd replay FILE`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

from tvkd_fast.data import PairDataset
from tvkd_fast.distributed import World
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.ops import unchecked
from tvkd_fast.training.config import TrainConfig, from_record, micro_batching
from tvkd_fast.training.scoring import Scorer
from tvkd_fast.training.step import preference_output


@dataclass(frozen=True)
class Replayed:
    """What one pair did."""

    pair: int
    """Its place in the data."""
    row: str
    """Where it was read from."""
    tokens: int
    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def read_record(path: str | Path) -> tuple[int, list[int], TrainConfig]:
    """What a run wrote of a step: its number, its pairs, and the run. ValueError where the file is no such record."""
    try:
        record: dict[str, Any] = json.loads(Path(expanduser(path)).read_text())
        config = from_record(TrainConfig, record["config"])
        return int(record["step"]), list(record["pairs"]), config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no record of a step: give a nonfinite-step-NNNNNN.json from a run's output_dir"
        ) from error


def replay_pairs(
    policy: PolicyWithHead,
    scorer: Scorer,
    dataset: PairDataset,
    pairs: list[int],
    config: TrainConfig,
    world: World,
) -> list[Replayed]:
    """Loss and gradient norm of each pair alone, over weights that are left as they are; not for sft."""
    if config.objective == "sft":
        raise ValueError("sft has no pairs to replay: look at the rows themselves, by the places that the record names")
    found = []
    for i in pairs:
        policy.zero_grad(set_to_none=True)
        (batch,) = micro_batching(replace(config, pairs_per_micro_batch=1)).batches(dataset, [i])
        batch = batch.to(world.device)
        with unchecked():
            logps = segment_sums(policy(batch), batch.cu_seqlens)
            out = preference_output(logps, batch, scorer.of(batch), config.loss, config.objective)
            out.losses.sum().backward()
        norms = [p.grad.norm() for p in policy.parameters() if p.grad is not None]
        found.append(
            Replayed(
                i,
                str(dataset[i].row),
                batch.num_tokens,
                float(out.losses.detach().sum()),
                float(torch.stack(norms).norm()) if norms else 0.0,
            )
        )
    policy.zero_grad(set_to_none=True)
    return found


def told(found: list[Replayed]) -> str:
    """A line a pair, those that are not finite first."""
    head = f"{'pair':>8} {'tokens':>7} {'loss':>12} {'grad norm':>12}  row"
    rows = sorted(found, key=lambda x: (x.finite, -x.grad_norm if x.finite else 0.0))
    lines = [f"{x.pair:>8} {x.tokens:>7} {x.loss:>12.5g} {x.grad_norm:>12.5g}  {x.row}" for x in rows]
    bad = sum(not x.finite for x in found)
    said = (
        f"{bad} of {len(found)} pairs are not finite alone"
        if bad
        else "every pair is finite alone, under the weights of the newest checkpoint: what went wrong came later or "
        "from their sum; look at the largest gradients, lower --optim.lr, or add --optim.warmup_steps"
    )
    return "\n".join([head, *lines, said])
