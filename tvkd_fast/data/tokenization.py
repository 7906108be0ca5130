"""Token ids of a preference pair: one prompt, two responses that end.

The border between prompt and response is a border between tokens on purpose: the prompt is tokenized on its own, once,
and each response on its own. So the prompt's ids are the same in both responses by construction, whatever a tokenizer
would merge across the border, and the two responses can share the prompt's computation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from tvkd_fast.data.formats import BadPair, Message, Preference
from tvkd_fast.data.templates import check_columns, check_without_template, variables_of, write_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = "26 Jul 2024"
"""Llama 3's templates write today's date unless told one: left to the clock, a dataset's tokens change overnight."""

_HH_NAMES = {"user": "Human", "assistant": "Assistant"}


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of a prompt and of two responses to it.

    `chosen_ended` and `rejected_ended` say whether the response's last id is the end of a sequence or of a turn; it is
    not where truncation cut the response. `row` says where the pair came from.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_ended: bool
    rejected_ended: bool
    row: str


class PairTokenizer:
    """Tokenizes pairs with one tokenizer; `tokenize_pair` is the same for a single pair.

    Args:
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        chat_template: "auto" writes conversational pairs with the tokenizer's chat template if it has one; "never"
            writes them as HH-RLHF does: "\\n\\nHuman: …\\n\\nAssistant:", then " …". Plain pairs stay plain in both.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat_template: Literal["auto", "never"] = "auto") -> None:
        if chat_template not in ("auto", "never"):
            raise ValueError(f"chat_template is {chat_template!r}: give 'auto' or 'never'")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so no response could end: set tokenizer.eos_token to a "
                "token of its vocabulary, or give the tokenizer that belongs to the model"
            )
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.uses_template = chat_template == "auto" and bool(tokenizer.chat_template)
        self._variables = variables_of(tokenizer) if self.uses_template else frozenset()
        added = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        self.special_ids: frozenset[int] = frozenset({*tokenizer.all_special_ids, *added})

    @property
    def special_tokens(self) -> frozenset[str]:
        """The special ids as they are written."""
        return frozenset(self.tokenizer.convert_ids_to_tokens(sorted(self.special_ids)))

    def __call__(self, pair: Preference) -> TokenizedPair:
        """Ids of one pair; see `tokenize_pair`."""
        templated = self.uses_template and not isinstance(pair.prompt, str)
        if templated:
            prompt, chosen, rejected = self._render(pair)
            prompt_ids = self._ids(prompt)
        else:
            prompt, chosen, rejected = _render_plain(pair)
            prompt_ids = self._prompt_ids(prompt)
        if not prompt_ids:
            raise BadPair(pair.row, "prompt without tokens")
        chosen_ids = self._response_ids(chosen, pair.row, "chosen", templated)
        rejected_ids = self._response_ids(rejected, pair.row, "rejected", templated)
        if chosen_ids == rejected_ids:
            raise BadPair(pair.row, "chosen equals rejected", "both responses have the same tokens")
        return TokenizedPair(prompt_ids, chosen_ids, rejected_ids, True, True, pair.row)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _prompt_ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        added_end = ids[-1:] == [self.eos_id] and not text.endswith(self.tokenizer.eos_token)
        return ids[:-1] if added_end else ids

    def _response_ids(self, text: str, row: str, name: str, templated: bool) -> list[int]:
        # Templates write a newline after the end of a turn; generation stops before it, so it is no action.
        ids = self._ids(text.rstrip() if templated else text)
        ended = bool(ids) and ids[-1] in (self.special_ids if templated else {self.eos_id})
        content = ids[:-1] if ended else ids
        if not content:
            raise BadPair(row, "response without tokens", name)
        return ids if ended else [*ids, self.eos_id]

    def _render(self, pair: Preference) -> tuple[str, str, str]:
        assert isinstance(pair.prompt, list)
        assert isinstance(pair.chosen, list)
        assert isinstance(pair.rejected, list)
        check_columns(pair, self._variables)
        prompt = self._template(pair.prompt, pair, add_generation_prompt=True)
        responses = []
        for answer in (pair.chosen, pair.rejected):
            whole = self._template([*pair.prompt, *answer], pair, add_generation_prompt=False)
            if not whole.startswith(prompt):
                raise ValueError(
                    f"{pair.row}: the tokenizer's chat template writes the prompt otherwise once an answer follows it, "
                    "so prompt and response cannot be told apart: pass --data.chat_template never, or give the "
                    "tokenizer a template that leaves earlier turns as they are"
                )
            responses.append(whole[len(prompt) :])
        return prompt, responses[0], responses[1]

    def _template(self, messages: list[Message], pair: Preference, *, add_generation_prompt: bool) -> str:
        given = {"date_string": TEMPLATE_DATE, **pair.template}
        return write_messages(self.tokenizer, messages, given, pair.row, add_generation_prompt=add_generation_prompt)


def tokenize_pair(
    pair: Preference, tokenizer: PreTrainedTokenizerBase, *, chat_template: Literal["auto", "never"] = "auto"
) -> TokenizedPair:
    """Token ids of one pair.

    - Plain: the prompt with the special tokens that the tokenizer puts in front of a text (a trailing end-of-sequence
      token is taken off), each response without any, then `eos_token_id` unless the text itself ends with it.
    - Conversational with a chat template: the prompt is what the template writes up to and with its generation prompt;
      a response is the rest of what it writes for the whole conversation. The response's last token is the special
      token that the template ends the turn with, whatever its name; what comes after it (a newline) is cut. Where
      the template ends a turn with no special token, `eos_token_id` is appended.
    - Conversational without one, or with `chat_template="never"`: HH-RLHF's plain writing, tokenized as plain.

    To tokenize many pairs, make one `PairTokenizer` and call it.

    Raises:
        BadPair: prompt or response has no tokens, both responses have the same ones, the template refuses the
            conversation (some ask user and assistant to take turns) or fails over it, or there is none to write what
            the row carries beside roles and contents.
        ValueError: the tokenizer has no end-of-sequence token, or its template rewrites the prompt.
    """
    return PairTokenizer(tokenizer, chat_template=chat_template)(pair)


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
        room = max_length - longer
        if room < 1:
            raise BadPair(
                pair.row,
                "the longer response leaves no room for a prompt token",
                detail,
                "Raise --data.max_length, or leave such pairs out with --data.overlong drop",
            )
        return replace(pair, prompt_ids=pair.prompt_ids[-room:]), True
    room = max_length - prompt
    remedy = "Raise --data.max_length, cut prompts with --data.truncation keep_end, or leave such pairs out with "
    remedy += "--data.overlong drop"
    if room < 1:
        raise BadPair(pair.row, "the prompt leaves no room for a response token", detail, remedy)
    chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
    if chosen == rejected:
        raise BadPair(pair.row, "the responses are the same where both are cut", detail, remedy)
    cut = replace(
        pair,
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_ended=pair.chosen_ended and len(pair.chosen_ids) <= room,
        rejected_ended=pair.rejected_ended and len(pair.rejected_ids) <= room,
    )
    return cut, True


def _render_plain(pair: Preference) -> tuple[str, str, str]:
    if isinstance(pair.prompt, str):
        assert isinstance(pair.chosen, str)
        assert isinstance(pair.rejected, str)
        return pair.prompt, pair.chosen, pair.rejected
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)
    check_without_template(pair)
    return f"{_dialogue(pair.prompt)}\n\nAssistant:", _answer(pair.chosen), _answer(pair.rejected)


def _dialogue(messages: list[Message]) -> str:
    return "".join(f"\n\n{_HH_NAMES.get(m['role'], m['role'].capitalize())}: {m['content']}" for m in messages)


def _answer(messages: list[Message]) -> str:
    return f" {messages[0]['content']}{_dialogue(messages[1:])}"
