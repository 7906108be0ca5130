"""`tvkd replay FILE`: a step that was not finite, once more and pair by pair."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tvkd_fast.commands.models import (
    resolve_device,
)
from tvkd_fast.commands.prepare import prepare
from tvkd_fast.data import PairDataset
from tvkd_fast.distributed import World
from tvkd_fast.models import (
    PolicyWithHead,
)
from tvkd_fast.objectives import Need
from tvkd_fast.ops import unchecked
from tvkd_fast.scoring.scorer import Scorer
from tvkd_fast.training.checkpoint import Checkpoints, check_same_run, read_state
from tvkd_fast.training.optim import make_optimizer
from tvkd_fast.training.record import from_record
from tvkd_fast.training.train_config import TrainConfig, micro_batching
from tvkd_fast.training.trainer import CHECKPOINTS

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Replayed:
    """The loss and gradient norm of one pair."""

    pair: int
    """Its place in the data."""
    row: str
    """The name of the row that the pair was read from."""
    tokens: int
    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def read_record(path: str | Path) -> tuple[int, list[int], TrainConfig]:
    """Return the step, pairs and config that a run recorded. Raises ValueError where the file is no such record."""
    try:
        record: dict[str, Any] = json.loads(Path(expanduser(path)).read_text())
        config = from_record(TrainConfig, record["config"])
        return int(record["step"]), list(record["pairs"]), config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no record of a step: give a nonfinite-step-NNNNNN.json from a run's output_dir"
        ) from error


def replay(record: str) -> list[Replayed]:
    """`tvkd replay`: the pairs of a step that was not finite, one by one, under the newest checkpoint before it."""
    step, pairs, config = read_record(record)
    config = replace(config, data=replace(config.data, eval=None), eval_every=0, eval_scores=None, keep_best="none")
    # A file does not decide that code from a hub is run.
    config.model.trust_remote_code = False
    world = World(resolve_device(config.model))
    made = prepare(config, world, verbose=False)
    checkpoints = Checkpoints(Path(expanduser(record)).parent / CHECKPOINTS, world, keep=config.keep_checkpoints)
    newest = checkpoints.newest()
    if newest is not None and read_state(newest)["step"] <= step:
        check_same_run(newest, made.identity)
        checkpoints.load(newest, made.policy, make_optimizer(made.policy, config.optim))
    made.policy.train()
    return replay_pairs(made.policy, made.scorer, made.dataset, pairs, config, world, step=step)


def replay_pairs(
    policy: PolicyWithHead,
    scorer: Scorer,
    dataset: PairDataset,
    pairs: list[int],
    config: TrainConfig,
    world: World,
    *,
    step: int = 0,
) -> list[Replayed]:
    """Loss and gradient norm of each pair alone, as `step` showed it, over weights that are left as they are; not for
    sft."""
    if Need.REJECTED not in config.loss.needs:
        raise ValueError(
            f"{config.objective} has no pairs to replay: look at the rows themselves, by the places that the record "
            "names"
        )
    found = []
    for i in pairs:
        policy.zero_grad(set_to_none=True)
        (batch,) = micro_batching(replace(config, pairs_per_micro_batch=1)).batches(dataset, [i])
        batch = config.loss.changed(batch, config.seed, step).to(world.device)
        with unchecked():
            scores = scorer.of(batch)
            out = config.loss.loss(config.loss.numbers(policy, scores, batch), scores, batch)
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


def report(found: list[Replayed]) -> str:
    """Return one line per pair, those that are not finite first."""
    head = f"{'pair':>8} {'tokens':>7} {'loss':>12} {'grad norm':>12}  row"
    rows = sorted(found, key=lambda x: (x.finite, -x.grad_norm if x.finite else 0.0))
    lines = [f"{x.pair:>8} {x.tokens:>7} {x.loss:>12.5g} {x.grad_norm:>12.5g}  {x.row}" for x in rows]
    bad = sum(not x.finite for x in found)
    verdict = (
        f"{bad} of {len(found)} pairs are not finite alone"
        if bad
        else "every pair is finite alone, under the weights of the newest checkpoint: what went wrong came later or "
        "from their sum; look at the largest gradients, lower --optim.lr, or add --optim.warmup_steps"
    )
    return "\n".join([head, *lines, verdict])
