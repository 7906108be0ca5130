"""Single responses with a label, as TRL's KTOTrainer reads them, and the other response that each is paired with.

A row has the columns `prompt`, `completion` and `label`: whether the completion is desirable. Objectives over such rows
estimate a KL divergence from responses to other prompts, so every row takes that of a later row as its second response.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvkd_fast.data.pairs import BadPair, Preference
from tvkd_fast.data.reading.formats import to_preference, to_response
from tvkd_fast.data.reading.sampled import COMPLETION, is_single, without_stand_in

LABEL = "label"
UNPAIR = "--data.unpair true"


def to_labelled(record: Mapping[str, Any], row: str) -> Preference:
    """A row of `prompt`, `completion` and `label`, true or false. BadPair for any other."""
    if not is_single(record):
        found = ", ".join(sorted(map(str, record))) or "none"
        remedy = f"Make the columns, or have two labelled responses made of every pair, {UNPAIR}"
        raise BadPair(row, "missing column", f"found: {found}; wanted: prompt, {COMPLETION}, {LABEL}", remedy)
    if LABEL not in record:
        remedy = "Add the column, true where the completion is desirable, or take --objective sft for responses alone"
        raise BadPair(row, "missing column", f"wanted: {LABEL}", remedy)
    label = record[LABEL]
    if label not in (0, 1):
        raise BadPair(row, "a label is neither true nor false", f"{LABEL} is {label!r}")
    return replace(to_response(record, row), desirable=bool(label))


def to_chosen(record: Mapping[str, Any], row: str) -> Preference:
    """A row of one response, or of two, of which the chosen one is learned from. BadPair where its label is false."""
    if is_single(record) and record.get(LABEL) == 0:
        remedy = "Leave such rows out, by --data.bad_pairs drop too, or take --objective kto, which reads labels"
        raise BadPair(row, "a response to learn from is undesirable", f"{LABEL} is {record[LABEL]!r}", remedy)
    return to_response(record, row)


def unpaired(record: Mapping[str, Any], row: str) -> list[Preference]:
    """The chosen response of a pair as a desirable one and the rejected one as another; a labelled row as it is."""
    if is_single(record):
        return [to_labelled(record, row)]
    pair = to_preference(record, row)
    # Ids are of both responses together, and are made anew of each one's text.
    chosen = replace(without_stand_in(pair, None), desirable=True)
    return [chosen, replace(chosen, chosen=pair.rejected, desirable=False)]


def labelled_or_paired(record: Mapping[str, Any], row: str) -> Preference:
    """A labelled row, or a preference, for whoever scores either."""
    return to_labelled(record, row) if is_single(record) and LABEL in record else to_preference(record, row)


def with_mismatched(pairs: Sequence[Preference]) -> list[Preference]:
    """Labelled responses with another prompt's as `rejected`: the next row's of another prompt, the last row's being
    the first. Sampled token ids are left out, which are of one response alone.

    Raises ValueError where rows with labels and without are mixed, all labels are the same, or a row has no such other.
    """
    labels = {pair.desirable for pair in pairs}
    if None in labels:
        odd = next(pair.row for pair in pairs if pair.desirable is None)
        raise ValueError(
            f"{odd} is a pair and others are single responses with labels: give one kind, or {UNPAIR} for all"
        )
    if len(labels) == 1:
        kind = "desirable" if labels == {True} else "undesirable"
        raise ValueError(
            f"all {len(pairs)} responses are {kind}, and nothing sets them apart: give rows of both labels, or train "
            "on desirable ones alone by --objective sft"
        )
    return [
        replace(pair, rejected=_next_other(pairs, place).chosen, single=False, sampled=None)
        for place, pair in enumerate(pairs)
    ]


def _next_other(pairs: Sequence[Preference], place: int) -> Preference:
    own = pairs[place]
    for other in _behind(pairs, place):
        same_kind = isinstance(other.chosen, str) == isinstance(own.chosen, str)
        if same_kind and other.prompt != own.prompt and other.chosen != own.chosen:
            return other
    raise ValueError(
        f"no other prompt's response can stand beside {own.row}, and the KL divergence is estimated from such: give "
        "rows of several prompts and responses"
    )


def _behind(pairs: Sequence[Preference], place: int) -> Iterator[Preference]:
    for step in range(1, len(pairs)):
        yield pairs[(place + step) % len(pairs)]
