"""The same text in another model's tokens: what a teacher reads that has a tokenizer of its own.

Ψ is a number a response, made of the teacher's states between the prompt's end and the response's. It needs the same
text, not the same tokens (docs/method.md). So pairs are written anew in the teacher's tokens and chat template, and a
pair whose text does not survive that is refused rather than scored for something else.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from tvkd_fast.data.dataset import PairDataset, report_of
from tvkd_fast.data.formats import BadPair, Message, Preference
from tvkd_fast.data.packing import MicroBatching
from tvkd_fast.data.tokenization import PairTokenizer, TokenizedPair, truncate_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWERS = ("chosen", "rejected")


def retokenize(
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: Literal["auto", "never"] = "auto",
    batching: MicroBatching | None = None,
) -> PairDataset:
    """The dataset's pairs, in its order, in the tokens of `other`.

    A response that was cut in the policy's tokens ends at the same character in the teacher's, without an end. A prompt
    that was cut is read whole: no state of it counts.

    Args:
        dataset: pairs with their text, as `build_dataset` makes them.
        tokenizer: the one that made its tokens.
        other: the teacher's.
        max_length: the most tokens that the teacher reads. A longer pair is cut as the dataset's own are, and counted
            in the report: the teacher then sees less of it than the policy.
        chat_template: as in `PairTokenizer`.
        batching: how the teacher's pairs will be put into micro-batches, where that limits their length.

    Raises:
        BadPair: names the row whose text `other` changes or leaves out, of which it is not known what the policy's cut
            left, or of which the teacher can read no part.
    """
    to_tokens = PairTokenizer(other, chat_template=chat_template)
    pairs: list[TokenizedPair] = []
    truncated = 0
    for pair, text in zip(dataset, dataset.texts, strict=True):
        read = _as_far_as_the_policy(pair, text, tokenizer)
        try:
            whole = to_tokens(read)
            _check_text(whole, read, other)
            own, was_cut = truncate_pair(
                _without_end(whole, pair), max_length=max_length, truncation=dataset.report.truncation
            )
            if batching is not None:
                batching.check_fits(own)
        except BadPair as bad:
            raise BadPair(
                bad.row,
                f"the teacher's tokens cannot be made: {bad.reason}",
                bad.detail,
                "Take the row out of the data, raise --tokens_per_micro_batch if the pair is too long for a row, or "
                "choose another teacher",
            ) from bad
        truncated += was_cut
        pairs.append(own)
    report = report_of(
        pairs,
        source=f"{dataset.report.source} in the teacher's tokens",
        max_length=max_length,
        truncation=dataset.report.truncation,
        truncated=truncated,
    )
    return PairDataset(pairs, report, dataset.texts)


def _as_far_as_the_policy(pair: TokenizedPair, text: Preference, tokenizer: PreTrainedTokenizerBase) -> Preference:
    """The text with each answer that was cut ending where its tokens do."""
    cut: dict[str, Any] = {}
    for name in _ANSWERS:
        if not getattr(pair, f"{name}_ended"):
            cut[name] = _shortened(getattr(text, name), getattr(pair, f"{name}_ids"), tokenizer, pair.row)
    return replace(text, **cut)


def _shortened(
    answer: str | list[Message], ids: list[int], tokenizer: PreTrainedTokenizerBase, row: str
) -> str | list[Message]:
    # A cut inside a character's bytes leaves a mark of its own at the end.
    kept = _decoded(ids, tokenizer).rstrip("\ufffd").lstrip()
    whole = answer if isinstance(answer, str) else answer[0]["content"]
    start = len(whole) - len(whole.lstrip())
    if not kept or not whole.startswith(kept, start):
        raise BadPair(
            row,
            "the text that a cut response has left is not the beginning of its answer",
            f"{len(ids)} tokens",
            "Raise --data.max_length, or leave such rows out of the data",
        )
    rest = whole[: start + len(kept)]
    return rest if isinstance(answer, str) else [{**answer[0], "content": rest}]


def _without_end(own: TokenizedPair, pair: TokenizedPair) -> TokenizedPair:
    """No end where the policy's response has none."""
    changes: dict[str, Any] = {}
    for name in _ANSWERS:
        if not getattr(pair, f"{name}_ended"):
            changes |= {f"{name}_ids": getattr(own, f"{name}_ids")[:-1], f"{name}_ended": False}
    return replace(own, **changes)


def _check_text(own: TokenizedPair, text: Preference, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every message must stand in what its tokens say, white space and Unicode's ways of writing a letter aside."""
    for name in ("prompt", *_ANSWERS):
        said = _letters(_decoded(getattr(own, f"{name}_ids"), tokenizer))
        place = 0
        for content in _contents(getattr(text, name)):
            place = said.find(_letters(content), place)
            if place < 0:
                raise BadPair(own.row, "its text is not what the teacher's tokens say", f"in the {name}")


def _contents(part: str | list[Message]) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    else:
        yield from (message["content"] for message in part)


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())
