"""Where a response ends, in token ids: asked by all that reads, cuts, scores or generates one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from tvkd_fast.data.chat_template import template_tail

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ResponseEnds:
    """A response ends with the first of the model's stop ids behind which only template text follows.

    Stop ids are the tokenizer's end of sequence, the ids at which the model's generation config ends, and the token
    that the chat template ends a turn with. Template text is white space, further stop ids, and what the template is
    seen to write behind the end of a turn.

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
        return frozenset(known if self._turn_end is None else {*known, self._turn_end[0]})

    @property
    def settings(self) -> tuple[list[int], list[int]]:
        """What decides where a response ends, to be compared."""
        return sorted(self.stop_ids), [] if self._turn_end is None else self._turn_end[1]

    @property
    def generation_stops(self) -> list[int]:
        """Ids at which the model's own generation is to stop."""
        return sorted(self.stop_ids | self.generation_ids)

    def cut(self, ids: list[int]) -> tuple[list[int], bool]:
        """A response's ids up to and with its end, and whether it has one; without an end they are left as they are."""
        end = self._end(ids)
        return (ids, False) if end is None else (ids[: end + 1], True)

    def blank(self, ids: Sequence[int]) -> int:
        """How many of the ids, from the first on, are white space."""
        return next((i for i, token in enumerate(ids) if not self._is_blank(token)), len(ids))

    def more_than_the_template_writes(self, behind: Sequence[int]) -> bool:
        """Whether the ids behind a response's end hold another one that the template does not write by itself: the
        answer brought its own along."""
        stops, after = self.stop_ids, [] if self._turn_end is None else self._turn_end[1]
        return sum(i in stops for i in behind) > sum(i in stops for i in after)

    def _end(self, ids: Sequence[int]) -> int | None:
        after = [] if self._turn_end is None else self._turn_end[1]
        length = len(ids)
        if after and list(ids[-len(after) :]) == after and set(ids[: -len(after)][-1:]) & self.stop_ids:
            length -= len(after)
        found = None
        for i in reversed(range(length)):
            if ids[i] in self.stop_ids:
                found = i
            elif not self._is_blank(ids[i]):
                break
        return found

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = token not in self.special_ids and not str(self.tokenizer.decode([token])).strip()
        return self._blank[token]

    @cached_property
    def _turn_end(self) -> tuple[int, list[int]] | None:
        """The token that the template ends a turn with, and the ids of what it writes behind that."""
        if not self.tokenizer.chat_template:
            return None
        tail = template_tail(self.tokenizer)
        ids = list(self.tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]) if tail else []
        # A character that the vocabulary lacks is no end, whatever id stands for it.
        ends = {self.eos_id, *(self._atomic - {self.tokenizer.unk_token_id})}
        first = next((i for i, token in enumerate(ids) if token in ends), None)
        if first is None:
            return None
        # Cohere's closes the response and then the turn; Phi's ends the turn, and a line later the text.
        last = next((i for i in range(first, len(ids)) if ids[i] not in ends), len(ids)) - 1
        return ids[last], ids[last + 1 :]
