"""The end of a response, in token ids: the one rule for reading, cutting, scoring and generating responses."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tvkd_fast.data.chat_template import template_tails

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TurnEnd:
    """The end of a template's turn: the tokens that close it, of which the last is the end, and the ids behind that."""

    closing: tuple[int, ...]
    behind: tuple[int, ...]


class ResponseEnds:
    """A response ends with the first of the model's stop ids behind which only template text follows.

    Stop ids are the tokenizer's end of sequence, the ids at which the model's generation config ends, and the tokens
    that the chat templates end a turn with, each of them with tools and without. Template text is white space, further
    stop ids, and what a template is seen to write behind the end of a turn. A response without an end gets the end of
    sequence.

    Args:
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        stop_ids: `models.load_stop_ids` of the model that the tokens are for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so no response could end: set tokenizer.eos_token to a "
                "token of its vocabulary, or give the tokenizer that belongs to the model"
            )
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.generation_ids = frozenset(stop_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        # Tokens that no other text is merged with, special or not: templates end turns with either.
        self._atomic = frozenset({*tokenizer.all_special_ids, *added})
        self.special_ids: frozenset[int] = frozenset(
            {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        )
        self._blank: dict[int, bool] = {}

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a response in text. One at which generation ends and which ordinary text may hold, a newline,
        is none of them."""
        known = {self.eos_id, *(self.generation_ids & self._atomic)}
        return frozenset(known | {end.closing[-1] for end in self._turn_ends})

    @property
    def settings(self) -> tuple[list[int], list[tuple[int, ...]]]:
        """Everything that decides where a response ends, in a form that can be compared."""
        return sorted(self.stop_ids), sorted(end.closing + end.behind for end in self._turn_ends)

    @property
    def generation_stops(self) -> list[int]:
        """Ids at which the model's own generation is to stop."""
        return sorted(self.stop_ids | self.generation_ids)

    def cut(self, ids: list[int]) -> tuple[list[int], bool]:
        """A response's ids up to and with its end, and whether it has one; without an end they are left as they are."""
        end = self._end(ids)
        return (ids, False) if end is None else (ids[: end + 1], True)

    def blank(self, ids: Sequence[int]) -> int:
        """Return the number of leading ids that are white space."""
        return next((i for i, token in enumerate(ids) if not self._is_blank(token)), len(ids))

    def more_than_the_template_writes(self, behind: Sequence[int]) -> bool:
        """Return whether the ids behind a response's end hold another one that no template writes by itself: the answer
        brought its own along."""
        written = [sum(i in self.stop_ids for i in end.behind) for end in self._turn_ends]
        return sum(i in self.stop_ids for i in behind) > max(written, default=0)

    def _end(self, ids: Sequence[int]) -> int | None:
        start, found = self._written_end(tuple(ids))
        for i in reversed(range(start)):
            if ids[i] in self.stop_ids:
                found = i
            elif not self._is_blank(ids[i]):
                break
        return found

    def _written_end(self, ids: tuple[int, ...]) -> tuple[int, int | None]:
        """Returns where the end that a template has written begins, and its last closing token.

        A template's whole end is known, so that what comes first in it, and ends turns of another template, is none.
        Without such an end: the length, and None.
        """
        found: list[tuple[int, int | None]] = [(len(ids), None)]
        for end in self._turn_ends:
            for behind in {end.behind, ()}:
                last = len(ids) - len(behind) - 1
                if last < 0 or ids[last + 1 :] != behind:
                    continue
                first = last + 1 - len(end.closing)
                if first >= 0 and ids[first : last + 1] == end.closing:
                    found.append((first, last))
                elif ids[last] in self.stop_ids:
                    found.append((last, last))
        return min(found, key=lambda place: place[0])

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = token not in self.special_ids and not str(self.tokenizer.decode([token])).strip()
        return self._blank[token]

    @cached_property
    def _turn_ends(self) -> list[TurnEnd]:
        """Return the turn ends of the tokenizer's templates that end a turn with a token of its own."""
        tails = template_tails(self.tokenizer) if self.tokenizer.chat_template else []
        ends = (self._turn_end(tail) for tail in tails)
        return list(dict.fromkeys(end for end in ends if end is not None))

    def _turn_end(self, tail: str) -> TurnEnd | None:
        ids = list(self.tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"])
        # A character that the vocabulary lacks is no end, whatever id stands for it.
        ends = {self.eos_id, *(self._atomic - {self.tokenizer.unk_token_id})}
        first = next((i for i, token in enumerate(ids) if token in ends), None)
        if first is None:
            return None
        # Cohere's closes the response and then the turn; Phi's ends the turn, and a line later the text.
        behind = next((i for i in range(first, len(ids)) if ids[i] not in ends), len(ids))
        return TurnEnd(tuple(ids[first:behind]), tuple(ids[behind:]))
