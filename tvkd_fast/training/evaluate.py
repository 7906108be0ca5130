"""A policy on held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.data import MicroBatching, PairBatch, PairDataset
from tvkd_fast.distributed import World
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.lent import in_eval
from tvkd_fast.training.config import LossConfig
from tvkd_fast.training.metrics import shaping_metrics
from tvkd_fast.training.scoring import OnlineScorer, Scorer
from tvkd_fast.training.step import length_differences, preference_output, values_of


@dataclass(frozen=True)
class Evaluation:
    """Figures over `pairs` held-out pairs, with the half-width of a 95% interval (normal) where there is an `_ci`."""

    pairs: int
    accuracy: float
    """Share of pairs in which the policy gives the chosen response the higher log-probability; NaN if any pair's is."""
    accuracy_ci: float
    margin: float
    """Mean of log π(y_w) − log π(y_l), nats."""
    margin_ci: float
    reward_accuracy: float | None = None
    """Share of pairs with β(ρ_w − ρ_l) > 0; None without a reference."""
    reward_margin: float | None = None
    """Mean of β(ρ_w − ρ_l); None without a reference."""
    loss: float | None = None
    """The run's own loss; None without a reference, or without a teacher in tvkd."""
    shaping_margin: float | None = None
    """Mean of α(Ψ_w − Ψ_l), and the diagnostics of losses.ShapingReport; None without a teacher."""
    shaping_std_ratio: float | None = None
    shaping_length_correlation: float | None = None
    shaping_flipped: float | None = None

    def known(self) -> dict[str, float]:
        """The figures that there are, and are finite: JSON has no other."""
        return {name: value for name, value in asdict(self).items() if value is not None and math.isfinite(value)}


@torch.no_grad()
def evaluate(
    policy: PolicyWithHead,
    dataset: PairDataset,
    *,
    scorer: Scorer | None = None,
    loss: LossConfig | None = None,
    objective: str = "dpo",
    batching: MicroBatching | None = None,
    world: World | None = None,
) -> Evaluation:
    """Accuracy and margins of the policy alone, and of its rewards where the scorer has a reference.

    Over the processes of `world`, where there are several: each pair in one of them, and the figures in all.
    """
    config = LossConfig() if loss is None else loss
    scorer = OnlineScorer(None, None) if scorer is None else scorer

    def columns(batch: PairBatch, token_logps: Tensor) -> Tensor:
        logps = segment_sums(token_logps, batch.cu_seqlens)
        scores = scorer.of(batch)
        has_reference = scores.ref_logps is not None
        has_loss = has_reference and (objective == "dpo" or values_of(scores, config) is not None)
        if batch.num_pairs == 0:
            return logps.new_empty(7, 0)
        out = preference_output(logps, batch, scores, config, objective)
        chosen, rejected = logps.chunk(2)
        flags = torch.tensor([[has_reference], [has_loss]]).expand(2, batch.num_pairs).to(logps.device)
        numbers = (chosen - rejected, out.losses, out.margins, out.shaping_margins, length_differences(batch), *flags)
        return torch.stack([x.double() for x in numbers])

    numbers = measure(policy, dataset, columns, batching=batching, world=world)
    difference, losses, margin, shaped, lengths, has_reference, has_loss = numbers
    right = _larger_than_0(difference)
    figures: dict[str, Any] = {
        "pairs": len(dataset),
        "accuracy": float(right.mean()),
        "accuracy_ci": _half_width(right),
        "margin": float(difference.mean()),
        "margin_ci": _half_width(difference),
    }
    if has_reference.all():
        figures["reward_accuracy"] = float(_larger_than_0(margin).mean())
        figures["reward_margin"] = float(margin.mean())
        if has_loss.all():
            figures["loss"] = float(losses.mean())
        if torch.count_nonzero(shaped):
            figures |= shaping_metrics(margin, shaped, lengths)
    return Evaluation(**figures)


@torch.no_grad()
def measure(
    policy: PolicyWithHead,
    dataset: PairDataset,
    columns: Callable[[PairBatch, Tensor], Tensor],
    *,
    batching: MicroBatching | None = None,
    world: World | None = None,
) -> Tensor:
    """[K, P] float64 numbers of every pair, in the dataset's order.

    `columns` makes [K, pairs] of a batch and the policy's (N,) log-probabilities of its response tokens.

    Over the processes of `world`, where there are several: each pair in one of them, and the numbers in all. Every
    process calls `columns` equally often, with a batch of no pairs where it has none left.
    """
    world = World(policy.model.device) if world is None else world
    batching = MicroBatching(policy.packing) if batching is None else batching
    found, places = [], []
    with in_eval(policy):
        for batch in batching.share(dataset, range(len(dataset)), rank=world.rank, size=world.size):
            batch = batch.to(world.device)
            found.append(columns(batch, policy(batch)).double().cpu())
            places.append(batch.pairs.cpu())
    everyone = world.everyone((torch.cat(found, 1), torch.cat(places)))
    numbers = torch.cat([numbers for numbers, _ in everyone], 1)
    order = torch.cat([places for _, places in everyone])
    return torch.empty_like(numbers).index_copy_(1, order, numbers)


def _larger_than_0(x: Tensor) -> Tensor:
    """1 or 0 where that can be told, NaN where x is: a pair that was not judged is not one that was judged wrong."""
    return torch.where(x.isnan(), x, (x > 0).double())


def _half_width(x: Tensor) -> float:
    return 1.96 * float(x.std()) / math.sqrt(x.numel()) if x.numel() > 1 else math.inf
