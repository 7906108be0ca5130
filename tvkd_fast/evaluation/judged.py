"""Models beside each other on preference pairs: who is right, by subset and section, how sure, and who is better.

Letters: P pairs, N response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tvkd_fast.data import MicroBatching, PairBatch, PairDataset
from tvkd_fast.distributed import World
from tvkd_fast.evaluation.evaluate import measure
from tvkd_fast.evaluation.intervals import bootstrap_interval, paired_p
from tvkd_fast.evaluation.rewardbench import SECTIONS, section_weights
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.scoring.scorer import Scorer

ReferenceFree = Literal["mean", "sum", "norm"]


@dataclass(frozen=True)
class Judged:
    """A model's scores of every pair's two responses."""

    name: str
    chosen: Tensor
    """(P,)"""
    rejected: Tensor
    """(P,)"""

    @property
    def right(self) -> Tensor:
        """(P,) float64, 1 where the chosen response has the higher score. A tie is wrong, as in RewardBench."""
        return (self.chosen > self.rejected).double()


def judge_pairs(
    name: str,
    policy: PolicyWithHead,
    dataset: PairDataset,
    *,
    reference: Scorer | None = None,
    reference_free: ReferenceFree = "mean",
    batching: MicroBatching | None = None,
    world: World | None = None,
) -> Judged:
    """A response's score is Σ_t log π − log π_ref where there is a reference; else of its tokens' log π the mean, the
    sum, or the negative Euclidean norm, which are RewardBench's `avg`, `sum` and `norm`. ValueError where one is NaN.
    """

    def columns(batch: PairBatch) -> Tensor:
        token_logps = policy(batch)
        if reference is not None:
            ref_logps = reference.of(batch).ref_logps
            assert ref_logps is not None
            scores = segment_sums(token_logps, batch.cu_seqlens) - ref_logps
        elif reference_free == "norm":
            scores = -segment_sums(token_logps.double().square(), batch.cu_seqlens).sqrt()
        else:
            scores = segment_sums(token_logps, batch.cu_seqlens)
            if reference_free == "mean":
                scores = scores / batch.cu_seqlens.diff()
        return scores.view(2, -1)

    chosen, rejected = measure(policy, dataset, columns, batching=batching, world=world)
    unjudged = [
        pair.row for pair, bad in zip(dataset, (chosen.isnan() | rejected.isnan()).tolist(), strict=True) if bad
    ]
    if unjudged:
        raise ValueError(
            f"{name} scores {len(unjudged)} of {len(dataset)} pairs as NaN, the first of them {unjudged[0]}: its "
            "weights or its reference's are not finite, or overflow in --model.autocast"
        )
    return Judged(name, chosen, rejected)


def by_row(model: Judged, rows: Sequence[str]) -> Judged:
    """Returns each row's lowest chosen and highest rejected score: a row is right where all of its pairs are.

    `rows` names each pair's row; rows are in the order of their first pairs.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(rows))}
    index = torch.tensor([places[name] for name in rows], device=model.chosen.device)
    chosen = model.chosen.new_zeros(len(places)).scatter_reduce(0, index, model.chosen, "amin", include_self=False)
    rejected = model.rejected.new_zeros(len(places)).scatter_reduce(
        0, index, model.rejected, "amax", include_self=False
    )
    return Judged(model.name, chosen, rejected)


def compared(models: Sequence[Judged], subsets: Sequence[str], *, sections: bool) -> dict[str, Any]:
    """Accuracies with 95% bootstrap intervals of every subset, every section and of all, for each model.

    Of every model but the first also its difference from the first, with an interval and a paired test over pairs.
    `subsets` names each pair's. Where `sections`, that of all is RewardBench's score, the mean over sections, and there
    is none unless every section has a pair; else it is the accuracy over all pairs.
    """
    places = {name: torch.tensor([i for i, x in enumerate(subsets) if x == name]) for name in dict.fromkeys(subsets)}
    # Where no subset is the benchmark's, there is nothing but all pairs.
    kinds = section_weights(set(places)) if sections else {}
    if kinds:
        every = {name: share / len(kinds) for of_section in kinds.values() for name, share in of_section.items()}
    else:
        every = {name: len(own) / len(subsets) for name, own in places.items()}
    whole = not kinds or len(kinds) == len(SECTIONS)
    weight = torch.zeros(len(subsets), dtype=torch.float64)
    for name, share in every.items():
        weight[places[name]] = share / len(places[name])
    found: dict[str, Any] = {"pairs": len(subsets), "models": []}
    for model in models:
        right = model.right
        row: dict[str, Any] = {"model": model.name, "ties": int((model.chosen == model.rejected).sum())}
        row["subsets"] = {name: {"pairs": len(own)} | _mean(right, {name: 1.0}, places) for name, own in places.items()}
        row["sections"] = {
            section: {"subsets": len(shares), "of": len(SECTIONS[section])} | _mean(right, shares, places)
            for section, shares in kinds.items()
        }
        if whole:
            row["score"] = _mean(right, every, places)
        found["models"].append(row)
    first = models[0].right
    for row, model in zip(found["models"][1:], models[1:], strict=True):
        ahead = model.right - first
        row["ahead"] = _mean(ahead, every, places) | {"p": paired_p(weight * ahead)}
    return found


def table(found: dict[str, Any]) -> str:
    """Format the comparison as a Markdown table."""
    models = found["models"]
    lines = [
        "| | pairs | " + " | ".join(row["model"] for row in models) + " |",
        "| --- | ---: |" + " ---: |" * len(models),
    ]
    # Without sections one subset is all there is, and stands below.
    subsets = models[0]["subsets"] if models[0]["sections"] or len(models[0]["subsets"]) > 1 else {}
    for name, of_first in subsets.items():
        cells = " | ".join(_cell(row["subsets"][name]) for row in models)
        lines.append(f"| {name} | {of_first['pairs']:,} | {cells} |")
    for name, of_first in models[0]["sections"].items():
        cells = " | ".join(_cell(row["sections"][name]) for row in models)
        lines.append(f"| **{name}**, {of_first['subsets']} of {of_first['of']} subsets | | {cells} |")
    if "score" in models[0]:
        name = "score, mean of sections" if models[0]["sections"] else "all"
        cells = " | ".join(_cell(row["score"]) for row in models)
        lines.append(f"| **{name}** | {found['pairs']:,} | {cells} |")
    if len(models) > 1:
        cells = " | ".join(f"{_cell(row['ahead'], signed=True)}, p = {row['ahead']['p']:.2g}" for row in models[1:])
        lines.append(f"| ahead of {models[0]['model']} | {found['pairs']:,} | | {cells} |")
    if "scores" in found:
        lines.append(f"\nA response's score: {found['scores']}.")
    return "\n".join(lines)


def _mean(numbers: Tensor, shares: dict[str, float], places: dict[str, Tensor]) -> dict[str, Any]:
    groups, weights = [places[name] for name in shares], list(shares.values())
    mean = sum(weight * float(numbers[own].mean()) for weight, own in zip(weights, groups, strict=True))
    return {"mean": mean, "interval": list(bootstrap_interval(numbers, groups=groups, weights=weights))}


def _cell(x: dict[str, Any], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    low, high = x["interval"]
    return f"{x['mean']:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
