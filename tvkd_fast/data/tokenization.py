"""Token ids of a preference pair: one prompt, two responses that end.

Prompt and response are tokenized together, as the model reads them: what a response's first token is hangs on what
stands before it. The prompt is what both sequences begin with and the prompt alone does too. So its ids are the same in
both responses by construction, and the two can share the prompt's computation. Where the tokenizer merges the prompt's
end with the beginning of a response, the merged token is the response's, and the pair says so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from tvkd_fast.data.chat_template import tail_behind
from tvkd_fast.data.pairs import SampledIds
from tvkd_fast.data.reading.formats import BadPair, Message, Preference
from tvkd_fast.data.reading.template_columns import check_columns, check_without_template, variables_of, write_messages
from tvkd_fast.data.response_end import ResponseEnds
from tvkd_fast.data.tokenizer_fingerprint import fingerprint_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = "--data.chat_template never"
"""The remedy where the tokenizer's template cannot write the data."""
_HH_NAMES = {"user": "Human", "assistant": "Assistant"}


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of a prompt and of two responses to it.

    A row of one response has no `rejected_ids`. `chosen_ended` and `rejected_ended` say whether the response's last id
    is the end of a sequence or of a turn; it is not where truncation cut the response. `row` names the pair's source.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_ended: bool
    rejected_ended: bool
    row: str
    merged: bool = False
    """The tokenizer merges the prompt's end with the beginning of a response."""
    written_before: bool = False
    """The text holds special tokens or an end of its own, as a chat template writes them."""
    rewards: tuple[tuple[float, float], ...] = ()
    """As in `Preference`."""
    sampled: bool = False
    """The ids are those that were sampled, and not made of text."""
    sampler_logps: tuple[float, ...] = ()
    """The log-probability of each of `chosen_ids` under the law that it was sampled from, nats, where it is known."""
    desirable: bool | None = None
    """As in `Preference`: the label of the chosen response, where the other one is of another prompt."""


@dataclass(frozen=True)
class _Sequence:
    """Prompt and response, and how much of it the prompt alone begins with too."""

    ids: list[int]
    border: int
    ended_by_itself: bool = False
    empty: bool = False


class PairTokenizer:
    """Tokenizes pairs with one tokenizer; `tokenize_pair` is the same for a single pair.

    Args:
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        chat_template: "auto" writes conversational pairs with the tokenizer's chat template if it has one; "never"
            writes them as HH-RLHF does: "\\n\\nHuman: …\\n\\nAssistant:", then " …". Plain pairs stay plain in both.
        stop_ids: ids at which the model ends what it generates; `models.load_stop_ids`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: Literal["auto", "never"] = "auto",
        stop_ids: Collection[int] = (),
    ) -> None:
        if chat_template not in ("auto", "never"):
            raise ValueError(f"chat_template is {chat_template!r}: give 'auto' or 'never'")
        self.ends = ResponseEnds(tokenizer, stop_ids)
        self.tokenizer = tokenizer
        self.uses_template = chat_template == "auto" and bool(tokenizer.chat_template)
        self._variables = variables_of(tokenizer) if self.uses_template else frozenset()
        self.special_ids = self.ends.special_ids

    @property
    def special_tokens(self) -> frozenset[str]:
        """The special ids as they are written."""
        return frozenset(self.tokenizer.convert_ids_to_tokens(sorted(self.special_ids)))

    def __call__(self, pair: Preference, *, chosen_ended: bool = True, rejected_ended: bool = True) -> TokenizedPair:
        """Ids of one pair; see `tokenize_pair`.

        A response that is declared not to have ended has no end, and nothing of what the template writes behind an
        answer. Ids that this tokenizer's model has sampled are taken as they are.
        """
        if pair.sampled is not None and pair.sampled.tokenizer == self._fingerprint:
            return _as_sampled(pair, pair.sampled)
        templated = self.uses_template and not isinstance(pair.prompt, str)
        if templated and pair.from_text:
            self._refuse_written(pair)
        ended = (chosen_ended, rejected_ended)
        prompt, *texts = self._render(pair, ended) if templated else _render_plain(pair)
        own = self._ids(prompt)
        opening = [] if templated else self._opening(own)
        alone = opening + own
        if not alone:
            raise BadPair(pair.row, "prompt without tokens")
        sequences = []
        for name, text, ends in zip(("chosen", "rejected"), texts, ended, strict=False):
            sequences.append(self._sequence(alone, opening, prompt, text, templated, ends))
            if sequences[-1].empty:
                raise BadPair(pair.row, "response without tokens", name)
        border = min(sequence.border for sequence in sequences)
        if border == 0:
            raise BadPair(pair.row, "prompt without tokens", "the tokenizer merges all of it with a response")
        chosen_ids, rejected_ids = ([sequence.ids[border:] for sequence in sequences] + [[]])[:2]
        if chosen_ids == rejected_ids:
            raise BadPair(pair.row, "chosen equals rejected", "both responses have the same tokens")
        by_itself = any(sequence.ended_by_itself for sequence in sequences)
        return TokenizedPair(
            alone[:border],
            chosen_ids,
            rejected_ids,
            chosen_ended,
            rejected_ended and not pair.single,
            pair.row,
            merged=border < len(alone),
            written_before=by_itself or (not templated and self.written_before(prompt)),
            rewards=pair.rewards,
            desirable=pair.desirable,
        )

    def prompt_of(self, pair: Preference) -> list[int]:
        """Returns the ids of a row's prompt alone, for generation. Raises BadPair as for the whole pair."""
        if self.uses_template and not isinstance(pair.prompt, str):
            check_columns(pair, self._variables)
            if pair.from_text:
                self._refuse_written(pair)
        return self.prompt_ids(pair.prompt, pair.row, pair.template)

    def prompt_ids(self, prompt: str | list[Message], row: str, given: Mapping[str, Any] | None = None) -> list[int]:
        """Returns the ids of a prompt alone, for generation; `given` is what its row gives the template."""
        if self.uses_template and not isinstance(prompt, str):
            return self._ids(self._template(prompt, row, given or {}, add_generation_prompt=True))
        if not isinstance(prompt, str):
            check_without_template(Preference(prompt, [], [], row, template=given or {}))
            prompt = _asked(prompt)
        own = self._ids(prompt)
        return self._opening(own) + own

    def written_before(self, text: str) -> bool:
        """Return whether the text has special tokens where a chat template writes them, at the beginning of a line. One
        in the middle of a sentence is only mentioned."""
        return self._written.search(text) is not None

    def _refuse_written(self, pair: Preference) -> None:
        assert isinstance(pair.prompt, list)
        if self.written_before(pair.prompt[-1]["content"]):
            remedy = "Write the prompt as messages, or prompt, chosen and rejected as text without a system column"
            raise BadPair(
                pair.row, "a chat template has written the prompt, and would write it again as one turn", remedy=remedy
            )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_tokenizer(self.tokenizer)

    @cached_property
    def _written(self) -> re.Pattern[str]:
        ids = sorted((self.special_ids - {self.tokenizer.unk_token_id}) | {self.ends.eos_id})
        tokens = "|".join(re.escape(token) for token in self.tokenizer.convert_ids_to_tokens(ids) if token.strip())
        return re.compile(rf"^\s*({tokens})", re.MULTILINE)

    @cached_property
    def opening(self) -> list[int]:
        """Return the ids that the tokenizer puts before a text."""
        for text in ("a", self.tokenizer.eos_token):
            own, around = self._ids(text), list(self.tokenizer(text, verbose=False)["input_ids"])
            places = range(len(around) - len(own) + 1) if own else ()
            start = next((i for i in places if around[i : i + len(own)] == own), None)
            if start is not None:
                return around[:start]
        return []

    def brings_opening(self, ids: list[int]) -> bool:
        """Return whether a text of these ids begins with the same itself, white space aside."""
        start = self.ends.blank(ids)
        return ids[start : start + len(self.opening)] == self.opening

    def _opening(self, ids: list[int]) -> list[int]:
        return [] if self.brings_opening(ids) else self.opening

    def _sequence(
        self, alone: list[int], opening: list[int], prompt: str, text: str, templated: bool, ends: bool
    ) -> _Sequence:
        ids = opening + self._ids(prompt + text)
        border = _alike(alone, ids)
        if not ends:
            return _Sequence(ids, border, empty=len(ids) == border)
        response, found = self.ends.cut(ids[border:])
        if found:
            behind = ids[border + len(response) :]
            by_itself = not templated or self.ends.more_than_the_template_writes(behind)
            return _Sequence(ids[:border] + response, border, by_itself, empty=len(response) == 1)
        text = prompt + (text.rstrip() if templated else text)
        ids = opening + self._ids(text + self.tokenizer.eos_token)
        if ids[-1:] != [self.ends.eos_id]:
            ids = [*opening, *self._ids(text), self.ends.eos_id]
        border = _alike(alone, ids)
        return _Sequence(ids, border, empty=len(ids) == border + 1)

    def _render(self, pair: Preference, ended: tuple[bool, bool]) -> tuple[str, ...]:
        assert isinstance(pair.prompt, list)
        assert isinstance(pair.chosen, list)
        assert isinstance(pair.rejected, list)
        check_columns(pair, self._variables)
        prompt = self._template(pair.prompt, pair.row, pair.template, add_generation_prompt=True)
        responses = []
        for answer, ends in zip((pair.chosen, pair.rejected)[: 2 - pair.single], ended, strict=False):
            messages = [*pair.prompt, *answer]
            whole = self._template(messages, pair.row, pair.template, add_generation_prompt=False)
            if not whole.startswith(prompt):
                raise BadPair(
                    pair.row,
                    "the chat template writes the prompt otherwise once an answer follows it",
                    "so prompt and response cannot be separated",
                    f"Pass {CHAT_TEMPLATE}, or give the tokenizer a template that leaves earlier turns as they are",
                )
            response = whole[len(prompt) :]
            responses.append(
                response if ends else response.removesuffix(tail_behind(self.tokenizer, messages, **pair.template))
            )
        return prompt, *responses

    def _template(
        self, messages: list[Message], row: str, given: Mapping[str, Any], *, add_generation_prompt: bool
    ) -> str:
        return write_messages(self.tokenizer, messages, given, row, add_generation_prompt=add_generation_prompt)


def tokenize_pair(
    pair: Preference,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: Literal["auto", "never"] = "auto",
    stop_ids: Collection[int] = (),
) -> TokenizedPair:
    """Token ids of one pair: what the tokenizer makes of prompt and response together.

    - Plain: prompt and response as one text, behind what the tokenizer puts in front of a text unless the prompt begins
      with it; then `eos_token_id`, unless the text ends with a stop id itself (`ResponseEnds`).
    - Conversational with a chat template: the prompt is what the template writes up to and with its generation prompt;
      a response is the rest of what it writes for the whole conversation, up to its end (`ResponseEnds`); what the
      template writes behind that, a newline, is left out. Where the template ends a turn with no special token,
      `eos_token_id` is appended.
    - Conversational without one, or with `chat_template="never"`: HH-RLHF's plain writing, tokenized as plain.

    A token of the prompt that is merged with a response's first is the response's, and left out of both prompts.
    To tokenize many pairs, make one `PairTokenizer` and call it.

    Raises:
        BadPair: prompt or response has no tokens, both responses have the same ones, the template refuses the
            conversation (some ask user and assistant to take turns), fails over it or rewrites the prompt, or there is
            none to write what the row carries beside roles and contents.
        ValueError: the tokenizer has no end-of-sequence token.
    """
    return PairTokenizer(tokenizer, chat_template=chat_template, stop_ids=stop_ids)(pair)


def truncate_pair(
    pair: TokenizedPair, *, max_length: int, truncation: Literal["keep_start", "keep_end"]
) -> tuple[TokenizedPair, bool]:
    """Cuts a pair so that prompt + response has at most `max_length` tokens in both responses.

    Args:
        pair: what `tokenize_pair` made.
        max_length: the most tokens of prompt and response together.
        truncation: "keep_start" (TRL's default) cuts the ends off the responses, which then have not ended; "keep_end"
            cuts the front off the prompt, as much as the longer response needs, and at least one prompt token stays.
            The prompt's ids stay the same in both responses under either.

    Returns:
        The pair, and whether anything was cut.

    Raises:
        BadPair: no token of a response, or none of the prompt, is left, or the responses have become the same.
        ValueError: `max_length` or `truncation` is none that makes sense.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}: a prompt token and a response token need at least 2")
    if truncation not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation is {truncation!r}: give 'keep_start' or 'keep_end'")
    prompt, longer = len(pair.prompt_ids), max(len(pair.chosen_ids), len(pair.rejected_ids))
    if prompt + longer <= max_length:
        return pair, False
    lengths = f"{prompt} prompt, {len(pair.chosen_ids)} chosen and {len(pair.rejected_ids)} rejected tokens"
    detail = f"{lengths}, max_length {max_length}, {truncation}"
    if truncation == "keep_end":
        left = max_length - longer
        if left < 1:
            raise BadPair(
                pair.row,
                "the longer response leaves no space for a prompt token",
                detail,
                "Raise --data.max_length, or leave such pairs out with --data.overlong drop",
            )
        return replace(pair, prompt_ids=pair.prompt_ids[-left:]), True
    left = max_length - prompt
    remedy = "Raise --data.max_length, cut prompts with --data.truncation keep_end, or leave such pairs out with "
    remedy += "--data.overlong drop"
    if left < 1:
        raise BadPair(pair.row, "the prompt leaves no space for a response token", detail, remedy)
    chosen, rejected = pair.chosen_ids[:left], pair.rejected_ids[:left]
    if chosen == rejected:
        raise BadPair(pair.row, "the responses are the same where both are cut", detail, remedy)
    cut = replace(
        pair,
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_ended=pair.chosen_ended and len(pair.chosen_ids) <= left,
        rejected_ended=pair.rejected_ended and len(pair.rejected_ids) <= left,
    )
    return cut, True


def _as_sampled(pair: Preference, sampled: SampledIds) -> TokenizedPair:
    chosen, rejected = (*sampled.responses, [])[:2]
    chosen_ended, rejected_ended = (*sampled.ended, False)[:2]
    if chosen == rejected:
        raise BadPair(pair.row, "chosen equals rejected", "both responses have the same tokens")
    return TokenizedPair(sampled.prompt, chosen, rejected, chosen_ended, rejected_ended, pair.row, sampled=True)


def _render_plain(pair: Preference) -> tuple[str, ...]:
    answers = (pair.chosen, pair.rejected)[: 2 - pair.single]
    if isinstance(pair.prompt, str):
        return pair.prompt, *(answer for answer in answers if isinstance(answer, str))
    check_without_template(pair)
    return _asked(pair.prompt), *(_answer(answer) for answer in answers if not isinstance(answer, str))


def _asked(messages: list[Message]) -> str:
    return f"{_dialogue(messages)}\n\nAssistant:"


def _dialogue(messages: list[Message]) -> str:
    return "".join(f"\n\n{_HH_NAMES.get(m['role'], m['role'].capitalize())}: {m['content']}" for m in messages)


def _answer(messages: list[Message]) -> str:
    return f" {messages[0]['content']}{_dialogue(messages[1:])}"


def _alike(ids: list[int], others: list[int]) -> int:
    """Return the length of the common prefix."""
    shorter = min(len(ids), len(others))
    return next((i for i in range(shorter) if ids[i] != others[i]), shorter)
