"""The start-up probes: does our head say what the model's own logits say, and does a packed row change any state?

Letters: T probe tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tvkd_fast.models.head import FusedLMHead
from tvkd_fast.models.shared_prompt import Layout, states_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 8
_PARTS = ((3, 2, 4), (5, 3, 2))
"""Tokens of prompt, chosen and rejected response of the packing probe's pairs."""
_PACKING_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 8e-2}
"""States of a model that sees wrongly are off by 8e-3 (ALiBi, an untrained model) to 0.2 (state-space). Rounding alone
is 2e-6 in float32, but 2e-4 in a trained model's state that has little before it (measured on SmolLM2)."""
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@torch.no_grad()
def probe_head(model: PreTrainedModel) -> None:
    """Compare the fused head's log-probabilities with those of the model's own logits on a few tokens.

    The logits are asked for in full, [T, V] of 8 tokens, once. Raises ValueError on a mismatch: the family transforms
    its logits in a way that the config's known names do not tell.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, FusedLMHead)
    ids = _spread(_PROBE_TOKENS, model)[None]
    was_training = model.training
    model.eval()
    own = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    model.train(was_training)
    labels = own.argmax(-1)
    expected = own.gather(1, labels[:, None])[:, 0]
    # The likeliest token and an unlikely one: a wrong scale or cap moves both, a shift of all logits moves neither.
    unlikely = own.argmin(-1)
    got = torch.stack([head(hidden, labels), head(hidden, unlikely)])
    wanted = torch.stack([expected, own.gather(1, unlikely[:, None])[:, 0]])
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))
    if not error <= _TOLERANCES[head.weight.dtype]:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) transforms its logits in a way this library does not "
            f"know: its log-probabilities differ from the head's by {error:.1e} under {head.transforms}. Add the "
            "family to tvkd_fast/models/head.py, or train it with a trainer that keeps its logits."
        )


@torch.no_grad()
def states_alone(model: PreTrainedModel) -> list[Tensor]:
    """[T, D] states of the probe's sequences, chosen and rejected response of each pair, each in a call of its own."""
    return [_in_eval(model, ids, None) for pair in _probe_pairs(model) for ids in _sequences(pair)]


@torch.no_grad()
def probe_packing(model: PreTrainedModel, alone: list[Tensor], *, shared: bool) -> None:
    """Compare the states of a packed row with those of `states_alone`, made before the model took packed rows.

    Raises ValueError where a state differs or the model cannot be called so: what its tokens see of one another is not
    all attention (state-space and recurrent models), or not all by position ids (ALiBi), or its attention takes no
    layout.
    """
    ids: list[Tensor] = []
    layout: list[tuple[int, int, int, int]] = []
    places: list[Tensor] = []
    for prompt, chosen, rejected in _probe_pairs(model):
        nothing = rejected[:0]
        for row in [(prompt, chosen, rejected)] if shared else [(prompt, chosen, nothing), (prompt, rejected, nothing)]:
            start = sum(map(len, ids))
            border, end = start + len(prompt), start + len(prompt) + len(row[1])
            layout.append((start, border, end, end + len(row[2])))
            ids += row
            places.append(torch.arange(start, end))
            if shared:
                places.append(torch.cat([torch.arange(start, border), torch.arange(end, end + len(rejected))]))
    try:
        states = _in_eval(model, torch.cat(ids), layout)
    except (TypeError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(_refusal(model, f"cannot be called with a packed row ({why})", shared)) from error
    worst = max(
        float((states[place.to(states.device)] - want).float().norm() / want.float().norm())
        for place, want in zip(places, alone, strict=True)
    )
    if not worst <= _PACKING_TOLERANCES[states.dtype]:
        raise ValueError(_refusal(model, f"has other states in a packed row, by {worst:.1e}", shared))


def _refusal(model: PreTrainedModel, why: str, shared: bool) -> str:
    unshared = "unshared, which packs without sharing prompts, or --model.packing " if shared else ""
    return f"{type(model).__name__} ({model.config.model_type}) {why}: set --model.packing {unshared}padded"


def _in_eval(model: PreTrainedModel, ids: Tensor, layout: Layout | None) -> Tensor:
    was_training = model.training
    model.eval()
    states = states_of(model, ids[None], layout)[0]
    model.train(was_training)
    return states


def _probe_pairs(model: PreTrainedModel) -> list[tuple[Tensor, Tensor, Tensor]]:
    ids = iter(_spread(sum(map(sum, _PARTS)), model).split([size for parts in _PARTS for size in parts]))
    return list(zip(ids, ids, ids, strict=True))


def _sequences(pair: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    return [torch.cat([pair[0], response]) for response in pair[1:]]


def _spread(count: int, model: PreTrainedModel) -> Tensor:
    """(count,) token ids from all over the vocabulary."""
    weight = model.get_output_embeddings().weight
    vocab = weight.shape[0]
    return torch.arange(count, device=weight.device) * max(1, vocab // (count + 1)) % vocab
