"""The start-up probes: does our head reproduce the model's own logits, and does a packed row change any state?

Letters: T probe tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tvkd_fast._compat import forward_hooks, sdpa_drops_softcaps
from tvkd_fast.models.head import FusedLMHead, answering_layer, head_transforms
from tvkd_fast.models.lent import in_eval
from tvkd_fast.models.shared_prompt import Layout, states_of, unpacked_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 8
_PARTS = ((3, 2, 4), (5, 3, 2))
"""Tokens of prompt, chosen and rejected response of the packing probe's pairs."""
_PACKING_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 8e-2}
"""States of a model that sees wrongly are off by 8e-3 (ALiBi, an untrained model) to 0.2 (state-space). Rounding alone
is 2e-6 in float32, but 2e-4 in a trained model's state that has little before it (measured on SmolLM2)."""
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class OwnAnswer:
    """A model's own answer for the probe's tokens."""

    logits: Tensor
    """[T, V]"""
    loss: Tensor | None
    """The loss with its own tokens as labels, where requested."""
    precision: torch.dtype
    """The dtype of its head's output."""
    autocast: torch.dtype | None
    """The autocast dtype that its own forward sets, None where it sets none."""
    calls_head: bool
    """Whether its logits are what its output embeddings returned."""


def loses_softcap(model: PreTrainedModel) -> bool:
    """Return whether the model's attention would be computed without the softcap that its config has."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return softcap is not None and unpacked_attention(model.config) == "sdpa" and sdpa_drops_softcaps()


def refuse_lost_softcap(model: PreTrainedModel) -> None:
    """Raise ValueError where a model's numbers would be those of attention without its softcap."""
    if loses_softcap(model):
        raise ValueError(
            f"{type(model).__name__} caps its attention's scores, which the installed transformers' sdpa leaves out "
            "without a word: set --model.attn_implementation eager, or install a newer transformers"
        )


def required_autocast(model: PreTrainedModel, autocast: torch.dtype | None) -> torch.dtype | None:
    """The autocast dtype without which the model cannot be called; None of a model that needs none.

    flash-attn computes in 16 bits alone. Raises ValueError where the weights are of 32 and `autocast` is None.
    """
    attention = unpacked_attention(model.config)
    if "flash" not in attention or model.dtype != torch.float32:
        return None
    if autocast is None:
        raise ValueError(
            f"{attention} computes in 16 bits, and the weights are of 32: make the model's dtype torch.bfloat16, or "
            "give PolicyWithHead autocast=torch.bfloat16"
        )
    return autocast


@torch.no_grad()
def own_answer(model: PreTrainedModel, *, with_loss: bool = False, autocast: torch.dtype | None = None) -> OwnAnswer:
    """Call the model as it is, under `autocast` where it is given. Raises ValueError where it cannot be called."""
    ids = probe_ids(model)
    kind = ids.device.type
    seen: list[tuple[torch.dtype, torch.dtype | None]] = []

    def note(_head: nn.Module, _inputs: Any, logits: Tensor) -> None:
        seen.append((logits.dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None))

    # Before FSDP2's own hook, which may cast them.
    handle = model.get_output_embeddings().register_forward_hook(note, prepend=True)
    try:
        with as_probed(model, autocast):
            out = model(input_ids=ids, **({"labels": ids} if with_loss else {}), use_cache=False)
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:
        given = "input_ids and labels" if with_loss else "input_ids"
        raise ValueError(
            f"{type(model).__name__} cannot be called with {given} as it is: {error}. Patch it once it can"
        ) from error
    finally:
        handle.remove()
    precision, autocast = seen[0] if seen else (out.logits.dtype, autocast)
    return OwnAnswer(out.logits[0], out.loss if with_loss else None, precision, autocast, bool(seen))


@torch.no_grad()
def probe_head(model: PreTrainedModel, autocast: torch.dtype | None = None) -> None:
    """Compare the fused head's log-probabilities with those of the model's own logits on a few tokens.

    Both are computed in the precision that the model's own forward brings, such as that of accelerate's mixed
    precision, and under `autocast` where the model cannot be called without. The logits are asked for in full, [T, V]
    of 8 tokens, once. Raises ValueError on a mismatch: the family transforms its logits in a way that the config's
    known names do not show. Nothing of the model stays changed.
    """
    head = answering_layer(model.get_output_embeddings())
    assert isinstance(head, FusedLMHead)
    ids, own = probe_ids(model), own_answer(model, autocast=autocast)
    with as_probed(model), torch.autocast(ids.device.type, dtype=own.autocast, enabled=own.autocast is not None):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]

        def logps(labels: Tensor) -> Tensor:
            return torch.stack([head(hidden, one) for one in labels])

        compare_logps(model, own.logits, logps, own.precision)


def probe_ids(model: PreTrainedModel) -> Tensor:
    """[1, T] tokens that a model is asked about."""
    return _spread(_PROBE_TOKENS, model)[None]


@contextmanager
def as_probed(model: PreTrainedModel, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode, no autocast but the given one, and answers by name, while the block lasts."""
    by_name = model.config.return_dict
    with in_eval(model), torch.autocast(_device(model).type, dtype=autocast, enabled=autocast is not None):
        # A family's head reads its backbone's answer by name, and fails over a config that differs.
        model.config.return_dict = True
        try:
            yield
        finally:
            model.config.return_dict = by_name


def compare_logps(
    model: PreTrainedModel, own: Tensor, answer: Callable[[Tensor], Tensor], precision: torch.dtype
) -> None:
    """Compare the log-probabilities [2, T] that `answer` has for labels [2, T] with the model's own logits [T, V].

    Raises ValueError where they differ by more than `precision` explains.
    """
    own = own.float().log_softmax(-1)
    # The likeliest token and an unlikely one: a wrong scale or cap moves both, a shift of all logits moves neither.
    labels = torch.stack([own.argmax(-1), own.argmin(-1)])
    wanted = own.gather(1, labels.T).T
    error = float((answer(labels) - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))
    if error <= tolerance(precision):
        return
    head = model.get_output_embeddings()
    hooks = forward_hooks(head)
    named = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks)
    transforms = getattr(answering_layer(head), "transforms", None) or head_transforms(model.config)
    raise ValueError(
        f"{type(model).__name__} ({model.config.model_type}) transforms its logits in a way this library does not "
        f"know: its log-probabilities differ from the head's by {error:.1e} under {transforms}. "
        + (f"Its head has hooks ({named}): take them off, or put them on afterwards. " if named else "")
        + "Add the family to tvkd_fast/models/head.py, or train it with a trainer that keeps its logits."
    )


def tolerance(precision: torch.dtype) -> float:
    """Return the difference that two computations of one number may have, relative to the largest."""
    return _TOLERANCES[precision]


@torch.no_grad()
def states_alone(model: PreTrainedModel, autocast: torch.dtype | None = None) -> list[Tensor]:
    """[T, D] states of the probe's sequences, chosen and rejected response of each pair, each in a call of its own."""
    return [_in_eval(model, ids, None, autocast) for pair in _probe_pairs(model) for ids in _sequences(pair)]


@torch.no_grad()
def probe_packing(
    model: PreTrainedModel, alone: list[Tensor], *, shared: bool, autocast: torch.dtype | None = None
) -> None:
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
        states = _in_eval(model, torch.cat(ids), layout, autocast)
    except (TypeError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(_refusal(model, f"cannot be called with a packed row ({why})", shared)) from error
    worst = max(
        float((states[place.to(states.device)] - want).float().norm() / want.float().norm())
        for place, want in zip(places, alone, strict=True)
    )
    if not worst <= _PACKING_TOLERANCES[autocast or states.dtype]:
        raise ValueError(_refusal(model, f"has other states in a packed row, by {worst:.1e}", shared))


def _refusal(model: PreTrainedModel, why: str, shared: bool) -> str:
    unshared = "unshared, which packs without sharing prompts, or --model.packing " if shared else ""
    return f"{type(model).__name__} ({model.config.model_type}) {why}: set --model.packing {unshared}padded"


def _in_eval(model: PreTrainedModel, ids: Tensor, layout: Layout | None, autocast: torch.dtype | None) -> Tensor:
    with as_probed(model, autocast):
        return states_of(model, ids[None], layout)[0]


def _probe_pairs(model: PreTrainedModel) -> list[tuple[Tensor, Tensor, Tensor]]:
    ids = iter(_spread(sum(map(sum, _PARTS)), model).split([size for parts in _PARTS for size in parts]))
    return list(zip(ids, ids, ids, strict=True))


def _sequences(pair: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    return [torch.cat([pair[0], response]) for response in pair[1:]]


def _spread(count: int, model: PreTrainedModel) -> Tensor:
    """(count,) token ids from all over the vocabulary."""
    vocab = model.get_output_embeddings().weight.shape[0]
    return torch.arange(count, device=_device(model)) * max(1, vocab // (count + 1)) % vocab


def _device(model: PreTrainedModel) -> torch.device:
    """Return the device for tokens; offloaded weights are on the meta device until their hooks bring them in."""
    device: torch.device = model.get_output_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device
