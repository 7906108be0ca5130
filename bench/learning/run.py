"""One run: an arm in a cell from one seed."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from bench.learning.arms import ARMS, Arm, ArmScorer, kl_loss, length_slope
from bench.learning.cells import MODEL_CONFIG, SELECTED_FROM, Cell
from tvkd_fast.commands.models import freeze, load_policy
from tvkd_fast.data import MicroBatching, PairBatch, PairDataset, pairs_of_step
from tvkd_fast.evaluation.evaluate import measure
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.scoring.scorer import CachedScorer
from tvkd_fast.training.optim import OptimConfig, learning_rate, make_optimizer
from tvkd_fast.training.step import train_step

OPTIM = OptimConfig(lr=3e-5, warmup_steps=15)
BATCHING = MicroBatching(tokens=1024)
WIDE = MicroBatching(tokens=2048)
"""Held-out pairs are not cut to what fits in a step."""


def settings() -> str:
    """Return the settings of every run beside its cell's budget."""
    return repr((OPTIM, BATCHING, WIDE, ARMS, SELECTED_FROM, MODEL_CONFIG))


def run(cell: Cell, name: str, seed: int) -> dict[str, Any]:
    """The record of a run: what it measured on every pair that is held out, its curve, and what it cost."""
    arm, budget = ARMS[name], cell.budget
    train = cell.dataset("train")
    held_out = cell.dataset("held_out"), cell.reference("held_out")
    policy = load_policy(str(cell.student), MODEL_CONFIG)
    start = time.process_time()
    step = _step_of(cell, arm, policy, train)
    optimizer = make_optimizer(policy, OPTIM)
    milestones = {round(budget.steps * part) for part in (1 / 3, 2 / 3, 1)}
    curve, trained = [], 0.0
    for number in range(budget.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, budget.steps, OPTIM)
        pairs = pairs_of_step(seed, number, num_pairs=len(train), pairs_per_step=budget.pairs)
        loss = step(pairs, optimizer)
        if number + 1 in milestones:
            trained += time.process_time() - start
            margins = margins_of(policy, *held_out, limit=budget.curve)
            curve.append({"step": number + 1, "margin": float(margins[0].mean()), "loss": loss})
            start = time.process_time()
    return {
        "cell": cell.name,
        "arm": name,
        "seed": seed,
        "curve": curve,
        "cpu_seconds": trained,
        "pairs": _named(margins_of(policy, *held_out)),
    }


def teachers(cell: Cell, limit: int = 600) -> dict[str, Any]:
    """Return the teacher's own figures on the first held-out pairs."""
    teacher = freeze(load_policy(str(cell.teacher), MODEL_CONFIG))
    columns = margins_of(teacher, cell.dataset("held_out"), cell.reference("held_out"), limit)
    return {"data": cell.data, "pairs": _named(columns)}


def _named(columns: torch.Tensor) -> dict[str, list[float]]:
    names = ("margin", "chosen_gain", "reward_margin", "length")
    return {key: [round(x, 3) for x in column.tolist()] for key, column in zip(names, columns, strict=True)}


def margins_of(
    policy: PolicyWithHead, dataset: PairDataset, reference: CachedScorer, limit: int | None = None
) -> torch.Tensor:
    """[4, P]: log π(y_w) − log π(y_l); what y_w gained since the start; what the margin did; the difference in length.

    With a `limit`, of the first pairs alone.
    """

    def columns(batch: PairBatch) -> torch.Tensor:
        logps = segment_sums(policy(batch), batch.cu_seqlens)
        known = reference.of(batch).ref_logps
        assert known is not None
        (chosen, rejected), (was_chosen, was_rejected) = logps.chunk(2), known.chunk(2)
        margin = chosen - rejected
        gained = margin - (was_chosen - was_rejected)
        return torch.stack([x.double() for x in (margin, chosen - was_chosen, gained, batch.length_differences)])

    return measure(policy, PairDataset(dataset[:limit], dataset.report), columns, batching=WIDE)


def _step_of(cell: Cell, arm: Arm, policy: PolicyWithHead, train: PairDataset) -> Any:
    """Return the function of one step, from pairs and optimizer to a loss."""
    if arm.source == "kl":
        distilled = freeze(load_policy(str(cell.teacher), MODEL_CONFIG))

        def distil(pairs: list[int], optimizer: torch.optim.Optimizer) -> float:
            (batch,) = BATCHING.batches(train, pairs, chosen_only=True)
            policy.train()
            loss = kl_loss(policy, distilled, batch)
            loss.backward()
            clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        return distil
    teacher = cell.potential(arm.potential) if arm.potential else None
    slope = 0.0
    if arm.source == "length":
        assert teacher is not None
        slope = length_slope(train, teacher, list(BATCHING.batches(train, range(len(train)))))
    scorer = ArmScorer(arm, cell.reference("train"), teacher, slope, policy)

    def prefer(pairs: list[int], optimizer: torch.optim.Optimizer) -> float:
        policy.train()
        batches = list(BATCHING.batches(train, pairs))
        out = train_step(policy, scorer, batches, optimizer, arm.loss, clip_norm=1.0)
        return float(out.loss)

    return prefer
