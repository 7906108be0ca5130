"""Greedy answers, to look at and to judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tvkd_fast.data.tokenization import PairTokenizer
from tvkd_fast.models import longest_sequence, stop_ids_of
from tvkd_fast.models.lent import in_eval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tvkd_fast.data.formats import Message, Preference


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    *,
    max_new_tokens: int = 40,
    of: Sequence[Preference] = (),
) -> list[str]:
    """The model's greedy answer to each conversation, cut at the end of its turn, the first of the model's stop ids.

    A single user's turn that a chat template has written already is asked as it stands. `of` are the pairs that the
    prompts were taken from, where they were: their tools and the template's variables. ValueError where a prompt and
    its answer are longer than the model's positions.
    """
    to_tokens = PairTokenizer(tokenizer, stop_ids=stop_ids_of(model))
    asked = [_as_it_stands(prompt, to_tokens) for prompt in prompts]
    names = [pair.row for pair in of] or [f"prompt {i}" for i in range(len(prompts))]
    given: list[Mapping[str, Any]] = [pair.template for pair in of] or [{}] * len(prompts)
    rows = [to_tokens.prompt_ids(*of_one) for of_one in zip(asked, names, given, strict=True)]
    length = max(map(len, rows))
    _check_positions(rows, max_new_tokens, longest_sequence(model.config))
    pad = tokenizer.eos_token_id
    # Padded on the left, so that every row goes on where its prompt ends.
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    stops = to_tokens.ends.generation_stops
    with in_eval(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=pad,
        )
    said = [_up_to(row[length:], stops) for row in out.tolist()]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in said]


def _as_it_stands(prompt: list[Message], to_tokens: PairTokenizer) -> str | list[Message]:
    if len(prompt) == 1 and to_tokens.written_before(prompt[0]["content"]):
        return prompt[0]["content"]
    return prompt


def _check_positions(rows: Sequence[Sequence[int]], max_new_tokens: int, positions: int) -> None:
    # All rows are as long as the longest.
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if len(rows[longest]) + max_new_tokens > positions:
        raise ValueError(
            f"prompt {longest} has {len(rows[longest]):,} tokens, and with {max_new_tokens} of an answer that is more "
            f"than the model's {positions:,} positions: lower --max_new_tokens, or leave such prompts out"
        )


def _up_to(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Without the first stop and what pads the row behind it."""
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]
