"""What the runs say: every arm against DPO of the same cell, seed and pairs.

Letters: R seeds, P pairs.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor

from bench.learning.arms import DPO
from tvkd_fast.training.intervals import bootstrap_interval, paired_p


def ahead(runs: list[dict[str, Any]], cell: str, split: str) -> list[dict[str, Any]]:
    """A row an arm: means over seeds and pairs, and how far margin and accuracy are ahead of DPO's.

    That is pair by pair and seed by seed, with 95% intervals over both and a paired test over pairs.
    """
    here = [one for one in runs if one["cell"] == cell and split in one["pairs"]]
    beside = {one["seed"]: one for one in here if one["arm"] == DPO}
    rows = []
    for arm in dict.fromkeys(one["arm"] for one in here):
        mine = sorted((one for one in here if one["arm"] == arm and one["seed"] in beside), key=lambda one: one["seed"])
        if not mine:
            continue
        theirs = [beside[one["seed"]] for one in mine]
        margins, right = _of(mine, split, "margin"), (_of(mine, split, "margin") > 0).double()
        further = margins - _of(theirs, split, "margin")
        better = right - (_of(theirs, split, "margin") > 0).double()
        rows.append(
            {
                "arm": arm,
                "seeds": len(mine),
                "pairs": margins.shape[1],
                "margin": float(margins.mean()),
                "accuracy": float(right.mean()),
                "reward_accuracy": float((_of(mine, split, "reward_margin") > 0).double().mean()),
                "chosen_gain": float(_of(mine, split, "chosen_gain").mean()),
                "further": float(further.mean()),
                "further_interval": bootstrap_interval(further),
                "further_by_seed": further.mean(1).tolist(),
                "further_p": paired_p(further.mean(0)),
                "better": float(better.mean()),
                "better_interval": bootstrap_interval(better),
                "better_p": paired_p(better.mean(0)),
                "cpu_seconds": mean(one["cpu_seconds"] for one in mine),
            }
        )
    return rows


def _of(runs: list[dict[str, Any]], split: str, name: str) -> Tensor:
    """[R, P]."""
    return torch.tensor([one["pairs"][split][name] for one in runs], dtype=torch.float64)
