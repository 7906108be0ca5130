"""The same text in another model's tokens: what a teacher reads that has a tokenizer of its own.

Ψ is a number per response, made of the teacher's states between the prompt's end and the response's. It needs the same
text, not the same tokens (docs/method.md). So pairs are written anew in the teacher's tokens and chat template, and a
pair whose text does not survive that is refused rather than scored for something else.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from tvkd_fast.data.dataset import PairDataset, report_of
from tvkd_fast.data.reading.formats import BadPair, Message, Preference
from tvkd_fast.data.reading.row_pairs import by_row, share_prompt, truncate_row
from tvkd_fast.data.reading.template_columns import carried
from tvkd_fast.data.tokenization import CHAT_TEMPLATE, PairTokenizer, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "never"]
_ANSWERS = ("chosen", "rejected")


def retokenize(
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: Template = "auto",
    other_chat_template: Template = "auto",
    stop_ids: Collection[int] = (),
    other_stop_ids: Collection[int] = (),
) -> PairDataset:
    """The dataset's pairs, in its order, in the tokens of `other`.

    A response that was cut in the policy's tokens ends at the same character in the teacher's, without an end. A prompt
    that was cut is read whole.

    Args:
        dataset: pairs with their text, as `build_dataset` makes them.
        tokenizer, chat_template, stop_ids: what made its tokens.
        other, other_chat_template, other_stop_ids: the teacher's; as in `PairTokenizer`.
        max_length: the most tokens that the teacher reads. A longer pair is cut as the dataset's own are, and counted
            in the report: the teacher then sees less of it than the policy.

    Raises:
        BadPair: names the first row, and how many more there are, whose text `other` changes or leaves out, of which it
            is not known what the policy's cut left, or of which the teacher can read no part.
        ValueError: the dataset has lost its text, or `other` cannot write conversations.
    """
    if len(dataset.texts) != len(dataset):
        raise ValueError("the pairs have lost their text, of which a teacher's tokens are made: build the dataset anew")
    ours = PairTokenizer(tokenizer, chat_template=chat_template, stop_ids=stop_ids)
    theirs = _teachers(other, other_chat_template, other_stop_ids)
    apart = ours.special_tokens ^ theirs.special_tokens
    pairs: list[TokenizedPair] = []
    bad: list[BadPair] = []
    truncated = 0
    for row, texts in zip(by_row(dataset), by_row(dataset.texts), strict=True):
        try:
            whole = [_rewritten(pair, text, ours, theirs, apart) for pair, text in zip(row, texts, strict=True)]
            cut = truncate_row(share_prompt(whole), max_length=max_length, truncation=dataset.report.truncation)
        except BadPair as refused:
            bad.append(refused)
            continue
        truncated += sum(was_cut for _, was_cut in cut)
        pairs += [pair for pair, _ in cut]
    if bad:
        remedy = "Leave such rows out of the data, or choose another teacher"
        if CHAT_TEMPLATE in bad[0].remedy:
            remedy += f", or pass {CHAT_TEMPLATE.replace('chat', 'teacher_chat')}"
        more = f", and {len(bad) - 1:,} more rows" if len(bad) > 1 else ""
        raise BadPair(
            bad[0].row,
            f"the teacher's tokens cannot be made: {bad[0].reason}",
            f"{bad[0].detail}{more}",
            remedy,
        )
    report = report_of(
        pairs,
        source=f"{dataset.report.source} in the teacher's tokens",
        max_length=max_length,
        truncation=dataset.report.truncation,
        truncated=truncated,
    )
    return PairDataset(pairs, report)


def _teachers(tokenizer: PreTrainedTokenizerBase, chat_template: Template, stop_ids: Collection[int]) -> PairTokenizer:
    try:
        return PairTokenizer(tokenizer, chat_template=chat_template, stop_ids=stop_ids)
    except ValueError as error:
        raise ValueError(f"of the teacher: {error}") from error


def _rewritten(
    pair: TokenizedPair, text: Preference, ours: PairTokenizer, theirs: PairTokenizer, apart: frozenset[str]
) -> TokenizedPair:
    _check_carried(text)
    _check_special(text, apart)
    return _own(_as_far_as_the_policy(pair, text, ours), pair, theirs)


def _check_carried(text: Preference) -> None:
    """Another template may leave out tools and thoughts, or have other variables, and nothing here would see it."""
    names = carried(text)
    if names:
        raise BadPair(text.row, "another template may not write what the row carries", ", ".join(names))


def _check_special(text: Preference, apart: frozenset[str]) -> None:
    """Refuse text that one tokenizer reads as special tokens and the other as plain text."""
    for part in (text.prompt, text.chosen, text.rejected):
        for content in _contents(part):
            found = next((token for token in apart if token in content), None)
            if found is not None:
                raise BadPair(text.row, "a special token of one tokenizer is plain text to the other", repr(found))


def _as_far_as_the_policy(pair: TokenizedPair, text: Preference, ours: PairTokenizer) -> Preference:
    """The text with each answer that was cut ending where its tokens do."""
    if pair.chosen_ended and pair.rejected_ended:
        return text
    whole = ours(text)
    cut: dict[str, Any] = {}
    for name in _ANSWERS:
        if not getattr(pair, f"{name}_ended"):
            decoded = _decoded(getattr(whole, f"{name}_ids"), ours.tokenizer)
            # A cut inside a character's bytes leaves a mark of its own at the end.
            left = len(_decoded(getattr(pair, f"{name}_ids"), ours.tokenizer).rstrip("\ufffd"))
            cut[name] = _shortened(getattr(text, name), decoded, left, text.row)
    return replace(text, **cut)


def _shortened(answer: str | list[Message], decoded: str, left: int, row: str) -> str | list[Message]:
    """Return the part of the answer in the first `left` characters of its decoded tokens."""
    kept: list[str] = []
    place = 0
    for content in _contents(answer):
        written = next((x for x in _spellings(content) if decoded.find(x, place) >= 0), None)
        if written is None:
            raise BadPair(row, "it is not known what a cut left of an answer", "its tokens say something else")
        start = decoded.find(written, place)
        if start >= left:
            break
        kept.append(written[: left - start])
        place = start + len(written)
    if not "".join(kept).strip():
        raise BadPair(row, "a cut left nothing of an answer's text")
    if isinstance(answer, str):
        return kept[0]
    return [{**message, "content": content} for message, content in zip(answer, kept, strict=False)]


def _spellings(content: str) -> list[str]:
    """Return the content unchanged, composed as some tokenizers do, and trimmed as templates do."""
    composed = unicodedata.normalize("NFC", content)
    return [content, composed, content.strip(), composed.strip()]


def _own(read: Preference, pair: TokenizedPair, theirs: PairTokenizer) -> TokenizedPair:
    """The text in the teacher's tokens, with an end where the policy's response has one."""
    own = theirs(read, chosen_ended=pair.chosen_ended, rejected_ended=pair.rejected_ended)
    _check_text(own, read, theirs.tokenizer)
    return own


def _check_text(own: TokenizedPair, text: Preference, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the decoded tokens contain every message, one after the other."""
    for answer in _ANSWERS:
        # Of both together: a token may hold the prompt's end and the answer's beginning.
        decoded = _letters(_decoded(own.prompt_ids + getattr(own, f"{answer}_ids"), tokenizer))
        place = 0
        for name in ("prompt", answer):
            for content in _contents(getattr(text, name)):
                letters = _letters(content)
                start = decoded.find(letters, place)
                if start < 0:
                    raise BadPair(own.row, "its text is not what the teacher's tokens say", f"in the {name}")
                place = start + len(letters)


def _contents(part: str | list[Message]) -> list[str]:
    return [part] if isinstance(part, str) else [message["content"] for message in part]


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _letters(text: str) -> str:
    """Return the text without white space, with Unicode's compatible characters unified (ﬁ and fi, ² and 2)."""
    return "".join(unicodedata.normalize("NFKC", text).split())
