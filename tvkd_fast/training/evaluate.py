"""A policy on held-out pairs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tvkd_fast.data import MicroBatching, PairDataset
from tvkd_fast.distributed import World
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.training.config import LossConfig
from tvkd_fast.training.metrics import shaping_metrics
from tvkd_fast.training.scoring import OnlineScorer, Scorer
from tvkd_fast.training.step import length_differences, preference_output, values_of


@dataclass(frozen=True)
class Evaluation:
    """Figures over `pairs` held-out pairs, with the half-width of a 95% interval (normal) where there is an `_ci`."""

    pairs: int
    accuracy: float
    """Share of pairs in which the policy gives the chosen response the higher log-probability."""
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
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> Evaluation:
    """Accuracy and margins of the policy alone, and of its rewards where the scorer has a reference.

    Over the processes of `world`, where there are several: each pair in one of them, and the figures in all.
    """
    was_training = policy.training
    policy.eval()
    config = LossConfig() if loss is None else loss
    scorer = OnlineScorer(None, None) if scorer is None else scorer
    world = World(torch.device(device)) if world is None else world
    batching = MicroBatching(policy.packing) if batching is None else batching
    found = []
    has_reference = has_loss = False
    for batch in batching.share(dataset, range(len(dataset)), rank=world.rank, size=world.size):
        batch = batch.to(world.device)
        logps = segment_sums(policy(batch), batch.cu_seqlens)
        scores = scorer.of(batch)
        if batch.num_pairs == 0:
            continue
        has_reference = scores.ref_logps is not None
        has_loss = has_reference and (objective == "dpo" or values_of(scores, config) is not None)
        out = preference_output(logps, batch, scores, config, objective)
        chosen, rejected = logps.chunk(2)
        columns = (chosen - rejected, out.losses, out.margins, out.shaping_margins, length_differences(batch))
        found.append(torch.stack([column.double() for column in columns]).cpu())
    policy.train(was_training)
    mine = torch.cat(found, 1) if found else torch.zeros(5, 0, dtype=torch.float64)
    everyone = world.everyone((mine, has_reference, has_loss))
    difference, losses, margin, shaped, lengths = torch.cat([numbers for numbers, _, _ in everyone], 1)
    # A process without a pair of its own does not know.
    has_reference = any(flag for _, flag, _ in everyone)
    has_loss = any(flag for _, _, flag in everyone)
    right = (difference > 0).double()
    figures: dict[str, Any] = {
        "pairs": len(dataset),
        "accuracy": float(right.mean()),
        "accuracy_ci": _half_width(right),
        "margin": float(difference.mean()),
        "margin_ci": _half_width(difference),
    }
    if has_reference:
        figures["reward_accuracy"] = float((margin > 0).double().mean())
        figures["reward_margin"] = float(margin.mean())
        if has_loss:
            figures["loss"] = float(losses.mean())
        if torch.count_nonzero(shaped):
            figures |= shaping_metrics(margin, shaped, lengths)
    return Evaluation(**figures)


def _half_width(x: torch.Tensor) -> float:
    return 1.96 * float(x.std()) / math.sqrt(x.numel()) if x.numel() > 1 else math.inf
