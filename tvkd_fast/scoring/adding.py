"""Scores that a folder holds already, to which others are added; nothing is computed twice."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from tvkd_fast.data import PairDataset
from tvkd_fast.files import MissingError
from tvkd_fast.scoring.cache import ScoreCache, short
from tvkd_fast.scoring.kinds import kind_of, token_kinds
from tvkd_fast.scoring.layout import STATE_NAMES, in_order
from tvkd_fast.scoring.manifest import ScoreManifest, read_manifest
from tvkd_fast.scoring.scorer import OnlineScorer

OF_ALL = ("dataset", "tokenizer", "reference", "precision")
OF_TEACHER = ("teacher", "teacher_reference", "teacher_tokens")
OF_STATES = ("kappa", "value_dtype")
OF_KEPT_STATES = ("states_dtype", "rotation")
"""Fields of a manifest that describe every number, the teacher's, those with one value per state, and kept states."""
_FOLLOWS = {"rotation": "states_dtype", **dict.fromkeys(("teacher", "teacher_reference", "reference"), "precision")}
"""Fields that differ where another does."""


def scores_to_keep(folder: str | Path, dataset: PairDataset, wanted: ScoreManifest) -> ScoreCache | None:
    """The folder's scores, where those that are `wanted` can stand beside them: they are of the same data and models,
    and no number per state is wanted under other settings. None where they cannot, or where there are none.

    Rows of tokens took a pass of the teacher and are never made anew without a word: ValueError where they are of the
    same data and teacher and cannot be kept, and for a manifest that cannot be read, since there may be such rows.
    """
    anew = f"give another --output_dir, or delete {folder} to score anew"
    try:
        found = read_manifest(folder)
    except MissingError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}. Where that does not help, {anew}") from error
    assert wanted.numbers is not None
    rows = token_kinds(found.numbers or ())
    # In another precision one teacher has other weights.
    same_teacher = wanted.teacher in (None, found.teacher) or wanted.precision != found.precision
    same = found.dataset == wanted.dataset and same_teacher
    others = [name for name in token_kinds(wanted.numbers) if kind_of(name) in map(kind_of, rows) and name not in rows]
    differ = [] if found.numbers is None else _differing(found, wanted, found.numbers)
    if rows and same and (differ or others):
        shown = [name for name in differ if _FOLLOWS.get(name) not in differ]
        made = [f"{name} {short(getattr(found, name))}, not {short(getattr(wanted, name))}" for name in shown]
        made += [f"{name} wanted" for name in others]
        raise ValueError(
            f"{folder} holds {', '.join(rows)} of the same data under other settings ({'; '.join(made)}), "
            f"and they would be thrown away: score with those settings, {anew}"
        )
    try:
        cache = ScoreCache.load(folder, dataset)
    except ValueError as error:
        if rows and same:
            raise ValueError(f"{error}. It holds {', '.join(rows)} too, which that would throw away: {anew}") from error
        return None
    return None if _differing(found, wanted, cache.numbers) else cache


def _differing(found: ScoreManifest, wanted: ScoreManifest, numbers: Collection[str]) -> list[str]:
    """The fields that would have to be equal for the `numbers` that were found and those wanted to be in one folder."""
    held, asked = set(numbers), set(wanted.numbers or ())
    names = [*OF_ALL, *(name for name in OF_TEACHER if None not in (getattr(found, name), getattr(wanted, name)))]
    if "states" in held & asked:
        names += OF_KEPT_STATES
    if not held.isdisjoint(STATE_NAMES) and not asked.isdisjoint(STATE_NAMES):
        names += OF_STATES
    return [name for name in names if getattr(found, name) != getattr(wanted, name)]


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
