"""Greedy answers, to look at and to judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tvkd_fast.data.tokenization import PairTokenizer
from tvkd_fast.models import longest_sequence, stop_ids_of
from tvkd_fast.rollout import ModelSampler, SamplePrompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tvkd_fast.data.reading.formats import Message, Preference


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[Message]],
    *,
    max_new_tokens: int = 40,
    of: Sequence[Preference] = (),
) -> list[str]:
    """The model's greedy answer to each prompt, cut at the end of its turn, the first of the model's stop ids.

    A text is asked as it stands, as it is trained on; a conversation is written by the chat template. How else the
    model is set to generate (beams, penalties, lengths) is left aside.

    Args:
        model, tokenizer: which answer.
        prompts: texts or conversations.
        max_new_tokens: the most tokens of an answer.
        of: the pairs that the prompts were taken from, where they were: their names, tools and template's variables.

    Raises:
        ValueError: a prompt and its answer are longer than the model's positions.
        BadPair: the chat template refuses a conversation, or there is none to write what it carries.
    """
    to_tokens = PairTokenizer(tokenizer, stop_ids=stop_ids_of(model))
    names = [pair.row for pair in of] or [f"prompt {i}" for i in range(len(prompts))]
    given: list[Mapping[str, Any]] = [pair.template for pair in of] or [{}] * len(prompts)
    rows = [to_tokens.prompt_ids(*asked) for asked in zip(prompts, names, given, strict=True)]
    _check_positions(rows, names, max_new_tokens, longest_sequence(model.config))
    sampler = ModelSampler(model, to_tokens.ends.generation_stops)
    asked_of = [SamplePrompt(row, name) for row, name in zip(rows, names, strict=True)]
    found = sampler.sample(asked_of, Sampling(max_new_tokens=max_new_tokens, temperature=0.0), seed=0)
    replies = [sample.ids[: len(sample.ids) - sample.ended] for (sample,) in found]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in replies]


def _check_positions(rows: Sequence[Sequence[int]], names: Sequence[str], max_new_tokens: int, positions: int) -> None:
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[longest]) + max_new_tokens > positions:
        raise ValueError(
            f"{names[longest]} has {len(rows[longest]):,} tokens, and with {max_new_tokens} of an answer that is more "
            f"than the model's {positions:,} positions: lower --max_new_tokens, or leave such prompts out"
        )
