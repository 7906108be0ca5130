"""Greedy answers, to look at and to judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tvkd_fast.data.templates import write_messages
from tvkd_fast.data.tokenization import TEMPLATE_DATE

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
    """The model's greedy answer to each conversation, cut at the end of its turn.

    `of` are the pairs that the prompts were taken from, where they were: their tools and the template's variables.
    """
    given = [{"date_string": TEMPLATE_DATE, **pair.template} for pair in of] or [{"date_string": TEMPLATE_DATE}] * len(
        prompts
    )
    names = [pair.row for pair in of] or [f"prompt {i}" for i in range(len(prompts))]
    texts = [
        write_messages(tokenizer, prompt, more, name, add_generation_prompt=True)
        for prompt, more, name in zip(prompts, given, names, strict=True)
    ]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, rows))
    pad = tokenizer.eos_token_id
    # Padded on the left, so that every row goes on where its prompt ends.
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    was_training = model.training
    model.eval()
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    model.train(was_training)
    return [tokenizer.decode(row[length:], skip_special_tokens=True).strip() for row in out]
