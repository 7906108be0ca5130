"""Scores that a folder holds already, to which others are added; nothing is computed twice."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from tvkd_fast.data import PairDataset
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.layout import NAMES, STATE_NAMES
from tvkd_fast.scoring.manifest import ScoreManifest
from tvkd_fast.scoring.scorer import OnlineScorer

OF_ALL = ("dataset", "tokenizer", "reference", "precision")
OF_TEACHER = ("teacher", "teacher_reference", "teacher_tokens")
OF_STATES = ("kappa", "value_dtype")
"""Fields of a manifest that describe every number, the teacher's, and those with one value per state."""


def scores_to_keep(folder: str | Path, dataset: PairDataset, wanted: ScoreManifest) -> ScoreCache | None:
    """The folder's scores, where those that are `wanted` can stand beside them: they are of the same data and models,
    and no number per state is wanted under other settings. None where they cannot, or where there are none."""
    try:
        cache = ScoreCache.load(folder, dataset)
    except ValueError:
        return None
    found = cache.manifest
    compared = [*OF_ALL, *(name for name in OF_TEACHER if None not in (getattr(found, name), getattr(wanted, name)))]
    assert wanted.numbers is not None
    if not set(STATE_NAMES).isdisjoint(cache.numbers) and not set(STATE_NAMES).isdisjoint(wanted.numbers):
        compared += OF_STATES
    return cache if all(getattr(found, name) == getattr(wanted, name) for name in compared) else None


def leave_out(scorer: OnlineScorer, held: Collection[str]) -> bool:
    """Make the scorer compute no number of these names; return whether any is left for it to compute."""
    if "ref_logps" in held:
        scorer.reference = None
    scorer.of_teacher = tuple(kind for kind in scorer.of_teacher if not set(scorer.names_of(kind)) <= set(held))
    if not scorer.of_teacher:
        scorer.teacher = None
    return scorer.reference is not None or scorer.teacher is not None


def joined(held: ScoreCache, wanted: ScoreManifest) -> ScoreManifest:
    """The manifest of scores that are held and of those that are wanted beside them."""
    assert wanted.numbers is not None
    of_held = {name: getattr(held.manifest, name) for name in OF_TEACHER if getattr(wanted, name) is None}
    if set(STATE_NAMES).isdisjoint(wanted.numbers):
        of_held |= {name: getattr(held.manifest, name) for name in OF_STATES}
    numbers = tuple(name for name in NAMES if name in {*held.numbers, *wanted.numbers})
    return replace(wanted, **of_held, numbers=numbers)
