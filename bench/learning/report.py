"""The runs summed up: every arm against DPO of the same cell, seed and pairs.

Letters: R seeds, P pairs.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from bench.learning.arms import ARMS, DPO
from tvkd_fast.evaluation.intervals import bootstrap_interval, paired_p


def ahead(runs: list[dict[str, Any]], cell: str) -> list[dict[str, Any]]:
    """A row an arm, DPO's first: means over seeds and pairs, and how far margin and accuracy are ahead of DPO's.

    That is pair by pair and seed by seed, with 95% intervals over both.
    """
    here = [one for one in runs if one["cell"] == cell]
    beside = {one["seed"]: one for one in here if one["arm"] == DPO}
    rows = []
    for arm in sorted({one["arm"] for one in here}, key=_place):
        mine = sorted((one for one in here if one["arm"] == arm and one["seed"] in beside), key=lambda one: one["seed"])
        if not mine:
            continue
        theirs = [beside[one["seed"]] for one in mine]
        margins, right = _of(mine, "margin"), (_of(mine, "margin") > 0).double()
        further = margins - _of(theirs, "margin")
        better = right - (_of(theirs, "margin") > 0).double()
        rows.append(
            {
                "arm": arm,
                "seeds": len(mine),
                "pairs": margins.shape[1],
                "margin": float(margins.mean()),
                "accuracy": float(right.mean()),
                "reward_accuracy": float((_of(mine, "reward_margin") > 0).double().mean()),
                "chosen_gain": float(_of(mine, "chosen_gain").mean()),
                "further_by_seed": further.mean(1).tolist(),
                "cpu_seconds": mean(one["cpu_seconds"] for one in mine),
                "commits": list(dict.fromkeys(one["commit"] for one in mine)),
                **_sure("further", further),
                **_sure("better", better),
            }
        )
    return rows


def _place(arm: str) -> tuple[int, str]:
    """Return a sort key in the order in which arms are listed."""
    return (list(ARMS).index(arm) if arm in ARMS else len(ARMS)), arm


def _sure(name: str, differences: Tensor) -> dict[str, Any]:
    interval, p = crossed(differences) if len(differences) > 1 else over_pairs(differences)
    return {name: float(differences.mean()), f"{name}_interval": interval, f"{name}_p": p}


def over_pairs(differences: Tensor) -> tuple[tuple[float, float], float]:
    """95% interval and p of the mean of [1, P] differences: of one seed, so of it alone."""
    return bootstrap_interval(differences), paired_p(differences[0])


def crossed(differences: Tensor) -> tuple[tuple[float, float], float]:
    """95% interval and two-sided p of the mean of [R, P] differences, over other seeds and other pairs.

    Seeds and pairs are crossed: the variance is s²(means of seeds)/R + s²(means of pairs)/P, which counts the noise of
    a pair in a seed twice and so errs towards none found; Student's t has the degrees of freedom of Satterthwaite,
    1946. Drawing R seeds again, as a bootstrap does, would leave out that the variance of five is itself a guess.
    """
    seeds, pairs = (means.var().item() / len(means) for means in (differences.mean(1), differences.mean(0)))
    middle, width = float(differences.mean()), (seeds + pairs) ** 0.5
    if width == 0:
        return (middle, middle), 1.0 if middle == 0 else 0.0
    degrees = (seeds + pairs) ** 2 / (seeds**2 / (len(differences) - 1) + pairs**2 / (differences.shape[1] - 1))
    reach = float(student.ppf(0.975, degrees)) * width
    return (middle - reach, middle + reach), float(2 * student.sf(abs(middle) / width, degrees))


def _of(runs: list[dict[str, Any]], name: str) -> Tensor:
    """[R, P]."""
    return torch.tensor([one["pairs"][name] for one in runs], dtype=torch.float64)
