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
from tvkd_fast.losses import segment_sums, shaping_report
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.lent import in_eval
from tvkd_fast.objectives import Factors, Objective, PolicyNumbers, known
from tvkd_fast.scoring.scorer import OnlineScorer, Scorer


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
    """The run's own loss, over pairs or over tokens as in training; None where the models that it needs are missing."""
    shaping_margin: float | None = None
    """Mean of α(Ψ_w − Ψ_l), and the diagnostics of losses.ShapingReport; None without a teacher."""
    shaping_std_ratio: float | None = None
    shaping_length_correlation: float | None = None
    shaping_flipped: float | None = None

    def known(self) -> dict[str, float]:
        """Return the figures that are finite; JSON has no other numbers."""
        return {name: value for name, value in asdict(self).items() if value is not None and math.isfinite(value)}


@torch.no_grad()
def evaluate(
    policy: PolicyWithHead,
    dataset: PairDataset,
    *,
    scorer: Scorer | None = None,
    objective: Objective | None = None,
    batching: MicroBatching | None = None,
    world: World | None = None,
) -> Evaluation:
    """Accuracy and margins of the policy alone; and the objective's rewards and loss, as far as the scores allow.

    Over the processes of `world`, where there are several: each pair in one of them, and the figures in all.
    """
    scorer = OnlineScorer(None, None) if scorer is None else scorer
    factors = _over(dataset)

    def columns(batch: PairBatch) -> Tensor:
        scores = scorer.of(batch)
        missing = frozenset() if objective is None else objective.needs - known(scores, batch)
        shown = None if objective is None else objective.without(missing)
        if shown is None:
            numbers = PolicyNumbers(segment_sums(policy(batch), batch.cu_seqlens), batch.lengths)
        else:
            numbers = shown.numbers(policy, scores, batch)
        if batch.num_pairs == 0:
            return numbers.logps.new_empty(7, 0)
        out = None if shown is None else shown.loss(numbers, scores, batch)
        chosen, rejected = numbers.logps.chunk(2)
        flags = torch.tensor([[out is not None and out.margins is not None], [out is not None and not missing]])
        nothing = torch.zeros_like(chosen)
        shown_of: list[Tensor | None] = [nothing, nothing, nothing]
        if out is not None and shown is not None:
            # What the batch adds to the loss over all pairs, in equal parts.
            part = shown.total(out, factors) / batch.num_pairs
            shown_of = [part.expand(batch.num_pairs), out.margins, out.shaping_margins]
        return torch.stack(
            [
                (chosen - rejected).double(),
                *((nothing if x is None else x).double() for x in shown_of),
                batch.length_differences.double(),
                *flags.expand(2, batch.num_pairs).double().to(chosen.device),
            ]
        )

    numbers = measure(policy, dataset, columns, batching=batching, world=world)
    difference, losses, margin, shaped, lengths, has_rewards, has_loss = numbers
    right = _larger_than_0(difference)
    figures: dict[str, Any] = {
        "pairs": len(dataset),
        "accuracy": float(right.mean()),
        "accuracy_ci": half_width(right),
        "margin": float(difference.mean()),
        "margin_ci": half_width(difference),
    }
    if has_rewards.all():
        figures["reward_accuracy"] = float(_larger_than_0(margin).mean())
        figures["reward_margin"] = float(margin.mean())
        if torch.count_nonzero(shaped):
            figures |= shaping_metrics(margin, shaped, lengths)
    if has_loss.all():
        figures["loss"] = float(losses.sum())
    return Evaluation(**figures)


def _over(dataset: PairDataset) -> Factors:
    """The factors of losses over all its pairs."""
    chosen, rejected = (
        sum(map(len, ids)) for ids in zip(*((p.chosen_ids, p.rejected_ids) for p in dataset), strict=True)
    )
    counts = (len(dataset), chosen, chosen + rejected)
    return Factors(*(1.0 / torch.tensor(counts, dtype=torch.float64)))


def shaping_metrics(margins: torch.Tensor, shaping_margins: torch.Tensor, lengths: torch.Tensor) -> dict[str, float]:
    """The shaping's diagnostics (docs/method.md) beside its mean margin."""
    report = shaping_report(margins, shaping_margins, lengths)
    return {
        "shaping_margin": float(shaping_margins.double().mean()),
        "shaping_std_ratio": report.std_ratio,
        "shaping_length_correlation": report.length_correlation,
        "shaping_flipped": report.flipped,
    }


@torch.no_grad()
def measure(
    policy: PolicyWithHead,
    dataset: PairDataset,
    columns: Callable[[PairBatch], Tensor],
    *,
    batching: MicroBatching | None = None,
    world: World | None = None,
) -> Tensor:
    """[K, P] float64 numbers of every pair, in the dataset's order.

    `columns` makes [K, pairs] of a batch, for which it calls the policy.

    Over the processes of `world`, where there are several: each pair in one of them, and the numbers in all. Every
    process calls `columns` equally often, with a batch of no pairs where it has none left.
    """
    world = World(policy.model.device) if world is None else world
    batching = MicroBatching(policy.packing) if batching is None else batching
    found, places = [], []
    with in_eval(policy):
        for batch in batching.share(dataset, range(len(dataset)), rank=world.rank, size=world.size):
            batch = batch.to(world.device)
            found.append(columns(batch).double().cpu())
            places.append(batch.pairs.cpu())
    gathered = world.all_gather((torch.cat(found, 1), torch.cat(places)))
    numbers = torch.cat([numbers for numbers, _ in gathered], 1)
    order = torch.cat([places for _, places in gathered])
    return torch.empty_like(numbers).index_copy_(1, order, numbers)


def _larger_than_0(x: Tensor) -> Tensor:
    """Return 1 where x > 0, 0 where it is not, and NaN where x is NaN: a pair without a number is not a wrong one."""
    return torch.where(x.isnan(), x, (x > 0).double())


def half_width(x: Tensor) -> float:
    """Return the half-width of a 95% interval (normal) of the mean of x (P,)."""
    return 1.96 * float(x.std()) / math.sqrt(x.numel()) if x.numel() > 1 else math.inf
