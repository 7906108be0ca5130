"""The fused answer of a patched model: log-probabilities and a loss, from its backbone's states and its head.

Letters: B rows, L row length, N labels, D hidden, V vocabulary.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from tvkd_fast.models import FusedLMHead, head_transforms
from tvkd_fast.models.head import fuse_head, head_layers
from tvkd_fast.ops import HeadGradient, HeadStats, Upstream
from tvkd_fast.ops.known import Derivative

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
LOGITS_AT_ONCE = 2**24
"""Most logits that are held at a time for a head that computes nothing else."""


@dataclass
class FusedLMOutput(ModelOutput):
    """The answer of a patched model; the names are those of TRL's fused head."""

    loss: Tensor | None = None
    """−Σ log_probs over the number of labels, or over `num_items_in_batch` where it is given; and `aux_loss`, times the
    model's own coefficient."""
    log_probs: Tensor | None = None
    """[B, L−1] float32; entry t is of label t+1, and 0 where that is −100. [B, L] of `shift_labels`, entry t of t."""
    label_mask: Tensor | None = None
    """[B, L−1] bool: where there are labels."""
    aux_loss: Tensor | None = None
    """The router's loss of a mixture of experts, as transformers computes it, where `output_router_logits` is set."""
    log_sum_sq_probs: Tensor | None = None
    """Shaped like `log_probs`: log Σ_v p(v)² of each label's distribution, without a gradient, where asked for."""


@dataclass(frozen=True)
class HeadSettings:
    """Settings of a patched model's head and answer."""

    gradient: HeadGradient
    stats: HeadStats | None
    output: type[FusedLMOutput]


def answer(
    model: PreTrainedModel,
    settings: HeadSettings,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    logits_to_keep: Tensor | int = 0,
    return_dict: bool | None = None,
    derivative: Derivative | None = None,
    collisions: bool = False,
    **inputs: Any,
) -> FusedLMOutput | tuple[Any, ...]:
    """The log-probabilities of labels [B, L], shifted here, or of `shift_labels` [B, L], which have been.

    `derivative` is that of a loss by each row's summed log-probability, of rows in pairs, where it is known: the head
    then makes its gradient in the forward. With `collisions` the answer has log Σp², by one more product.
    """
    if not isinstance(logits_to_keep, int) or logits_to_keep:
        raise ValueError("logits_to_keep leaves states out that labels belong to: mask labels by -100 instead")
    if is_empty(model.get_output_embeddings()):
        raise ValueError("this model is on the meta device, without weights: load them before it is asked for numbers")
    router = inputs.get("output_router_logits")
    if router is None:
        router = getattr(model.config.get_text_config(), "output_router_logits", False)
    if router:
        inputs["output_router_logits"] = True
    states = _states(model, inputs)
    hidden = states.last_hidden_state
    if shift_labels is None:
        assert labels is not None
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    shift_labels = shift_labels.to(hidden.device)
    mask = shift_labels != ignore_index
    upstream = None
    if derivative is not None:
        upstream = Upstream(derivative, nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)))
    logps = _logps(model, settings, hidden[mask], shift_labels[mask], upstream)
    log_probs = logps.new_zeros(mask.shape).masked_scatter(mask, logps)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    found = {"loss": -logps.sum() / count.to(logps.device), "log_probs": log_probs, "label_mask": mask}
    if collisions:
        found["log_sum_sq_probs"] = logps.new_zeros(mask.shape).masked_scatter(mask, _collisions(model, hidden[mask]))
    if router:
        aux_loss, coefficient = _router_loss(model, states, inputs.get("attention_mask"))
        found |= {"loss": found["loss"] + coefficient * aux_loss.to(logps.device), "aux_loss": aux_loss}
    out = settings.output(**found)
    whole = model.config.return_dict if return_dict is None else return_dict
    return out if whole else out.to_tuple()


def is_empty(head: Any) -> bool:
    """Return whether the head is on the meta device, and no hook of accelerate's loads its weights."""
    linears = (linear for linear in head_layers(head) if isinstance(linear, nn.Linear))
    return any(linear.weight.is_meta and not hasattr(linear, "_hf_hook") for linear in linears)


def fuse(model: PreTrainedModel, settings: HeadSettings) -> None:
    """Make the model's head answer for labels where it stands, and what peft trains in its place."""
    for head in fuse_head(model):
        head.gradient, head.stats = settings.gradient, settings.stats


def _states(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    inputs = inputs | {"use_cache": False}
    if not model.config.return_dict:
        inputs["return_dict"] = True
    return model.base_model(**inputs)


def _logps(
    model: PreTrainedModel, settings: HeadSettings, hidden: Tensor, labels: Tensor, upstream: Upstream | None
) -> Tensor:
    """(N,) log-probabilities, from hidden [N, D]."""
    # Looked up at every call: FSDP, PEFT and a new vocabulary replace modules.
    head = model.get_output_embeddings()
    if not all(isinstance(linear, FusedLMHead) for linear in head_layers(head)) and not _fuse_anew(model, settings):
        return torch.cat([*_by_logits(model, head, hidden, labels)])
    return head(hidden, labels=labels, upstream=upstream)


@torch.no_grad()
def _collisions(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(N,) log Σ_v p(v)², from hidden [N, D]."""
    head = model.get_output_embeddings()
    if not isinstance(head, FusedLMHead):
        raise ValueError(f"log Σp² is computed by a fused head, and this model has a {type(head).__name__}")
    lse, lse_2 = head(hidden, kappa=2.0)
    found: Tensor = lse_2 - 2 * lse
    return found


@torch.compiler.disable
def _fuse_anew(model: PreTrainedModel, settings: HeadSettings) -> bool:
    """Fuse a head that was put in after the model was patched; False where it cannot be."""
    try:
        fuse(model, settings)
    except ValueError as error:
        warnings.warn(
            f"no fused head is in place of this one, and its own logits are taken a few rows at a time, which is right "
            f"and slower: {error}",
            stacklevel=2,
        )
        return False
    return True


def _by_logits(model: PreTrainedModel, head: nn.Module, hidden: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Log-probabilities of a head that is asked for logits, in pieces that the backward computes again."""
    transforms, vocab = head_transforms(model.config), model.config.get_text_config().vocab_size

    def piece(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden) * transforms.logit_scale
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if transforms.softcap is not None:
            logits = transforms.softcap * torch.tanh(logits / transforms.softcap)
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    rows = max(1, LOGITS_AT_ONCE // vocab)
    # Split even where there is nothing, so that a batch without labels still reaches every weight.
    for part, own in zip(hidden.split(rows), labels.split(rows), strict=True):
        yield checkpoint(piece, part, own, use_reentrant=False)


def _router_loss(model: PreTrainedModel, states: Any, attention_mask: Tensor | None) -> tuple[Tensor, float]:
    """A mixture's loss for the balance of its experts, by its family's own code, and the coefficient it has there."""
    text = model.config.get_text_config()
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    balance = next((found for module in modules if (found := getattr(module, "load_balancing_loss_func", None))), None)
    logits = getattr(states, "router_logits", None)
    coefficient = _first("router_aux_loss_coef", "aux_loss_coef", of=(model, text))
    if balance is None or logits is None or coefficient is None:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) adds a loss of its router that this library does not "
            "know: set output_router_logits=False, or train it with a trainer that keeps its logits"
        )
    experts = _first("num_experts", "num_local_experts", of=(model, text))
    return balance(logits, experts, _first("num_experts_per_tok", of=(model, text)), attention_mask), coefficient


def _first(*names: str, of: tuple[Any, ...]) -> Any:
    return next((value for owner in of for name in names if (value := getattr(owner, name, None)) is not None), None)
