"""Greedy answers, to look at and to judge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tvkd_fast.data.tokenization import PairTokenizer
from tvkd_fast.models import longest_sequence, stop_ids_of
from tvkd_fast.models.lent import in_eval

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from tvkd_fast.data.reading.formats import Message, Preference


@torch.no_grad()
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
    from transformers import GenerationConfig

    to_tokens = PairTokenizer(tokenizer, stop_ids=stop_ids_of(model))
    names = [pair.row for pair in of] or [f"prompt {i}" for i in range(len(prompts))]
    given: list[Mapping[str, Any]] = [pair.template for pair in of] or [{}] * len(prompts)
    rows = [to_tokens.prompt_ids(*asked) for asked in zip(prompts, names, given, strict=True)]
    length = max(map(len, rows))
    _check_positions(rows, names, max_new_tokens, longest_sequence(model.config))
    pad, stops = tokenizer.eos_token_id, to_tokens.ends.generation_stops
    # Padded on the left, so that every row goes on where its prompt ends.
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=pad)
    with in_eval(model), _generating_by(model, greedy):
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    replies = [_up_to(row[length:], stops) for row in out.tolist()]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in replies]


@contextmanager
def _generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model with this config alone: transformers fills what a given one leaves open from the model's own."""
    held = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = held


def _check_positions(rows: Sequence[Sequence[int]], names: Sequence[str], max_new_tokens: int, positions: int) -> None:
    # All rows are as long as the longest.
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[longest]) + max_new_tokens > positions:
        raise ValueError(
            f"{names[longest]} has {len(rows[longest]):,} tokens, and with {max_new_tokens} of an answer that is more "
            f"than the model's {positions:,} positions: lower --max_new_tokens, or leave such prompts out"
        )


def _up_to(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Return the ids before the first stop."""
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]
