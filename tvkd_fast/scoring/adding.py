"""Scores that a folder holds already, to which others are added; nothing is computed twice."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from tvkd_fast.data import PairDataset
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.kinds import kind_of, token_kinds
from tvkd_fast.scoring.layout import STATE_NAMES, in_order
from tvkd_fast.scoring.manifest import ScoreManifest, read_manifest
from tvkd_fast.scoring.scorer import OnlineScorer

OF_ALL = ("dataset", "tokenizer", "reference", "precision")
OF_TEACHER = ("teacher", "teacher_reference", "teacher_tokens")
OF_STATES = ("kappa", "value_dtype")
OF_KEPT_STATES = ("states_dtype", "rotation")
"""Fields of a manifest that describe every number, the teacher's, those with one value per state, and kept states."""


def check_beside(folder: str | Path, wanted: ScoreManifest) -> None:
    """Raise ValueError where a folder holds, of the same data and teacher, a kind of tokens' rows under other settings:
    to write these in their place would be to throw away what took a pass to compute."""
    try:
        found = read_manifest(folder)
    except ValueError:
        return
    if (found.dataset, found.teacher) != (wanted.dataset, wanted.teacher):
        return
    held = {kind_of(name): name for name in token_kinds(found.numbers or ())}
    for name in token_kinds(wanted.numbers or ()):
        one, other = held.get(kind_of(name), name), name
        if "states" in held and name == "states":
            one, other = f"states in {found.states_dtype}", f"states in {wanted.states_dtype}"
        if one != other:
            raise ValueError(
                f"{folder} holds {one}, and {other} would take their place: give another --output_dir, or delete the "
                "folder"
            )


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
    if "states" in cache.numbers and "states" in wanted.numbers:
        compared += OF_KEPT_STATES
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
    if "states" not in wanted.numbers:
        of_held |= {name: getattr(held.manifest, name) for name in OF_KEPT_STATES}
    return replace(wanted, **of_held, numbers=in_order({*held.numbers, *wanted.numbers}))
