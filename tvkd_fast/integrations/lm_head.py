"""The fused head in a transformers model as it stands: one model at a time, put in and taken out by a call.

Letters: B rows, L row length, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tvkd_fast.models import FusedLMHead, head_transforms, probe_head
from tvkd_fast.ops import HeadGradient, HeadStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
_PATCH = "_tvkd_fast_patch"


@dataclass
class FusedLMOutput(ModelOutput):
    """What a patched model answers with; the names are those of TRL's fused head."""

    loss: Tensor | None = None
    """−Σ log_probs over the number of labels, or over `num_items_in_batch` where it is given."""
    log_probs: Tensor | None = None
    """[B, L−1] float32; entry t is of label t+1, and 0 where that is −100."""
    label_mask: Tensor | None = None
    """[B, L−1] bool: where there are labels."""


@dataclass
class _Patch:
    """What is needed to undo it."""

    forward: Any
    """The forward that an instance had of its own; None where it had its class's."""
    head: nn.Module


def patch_lm_head(
    model: PreTrainedModel,
    *,
    gradient: HeadGradient | None = None,
    stats: HeadStats | None = None,
    output: type[FusedLMOutput] = FusedLMOutput,
) -> PreTrainedModel:
    """Let `model(…, labels=labels, fused_lm_head=True)` answer with log-probabilities and a loss, and no logits.

    The head becomes a `FusedLMHead` of the same parameters, so that ties, optimizers and FSDP2's hooks see what they
    saw; every other call is the model's own. Only this model changes, and `unpatch_lm_head` puts back what was there.
    Only positions with a label reach the head: labels [B, L] are shifted here, as transformers shifts them.

    Args:
        model: a causal language model; of a PEFT model, `get_base_model()`.
        gradient: how it is differentiated; exact where not given (docs/sparse.md has the other kinds).
        stats: collects what sparse gradients were made of.
        output: the class of the answer.

    Returns:
        The same model.

    Raises:
        ValueError: it is patched already, its head is no plain linear layer, or its logits are not what the family's
            config says (a head of its own making).

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = patch_lm_head(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))
        >>> ids = torch.randint(32, (2, 6))
        >>> out = model(ids, labels=ids, fused_lm_head=True)
        >>> out.log_probs.shape, hasattr(out, "logits")
        (torch.Size([2, 5]), False)
    """
    if is_patched(model):
        raise ValueError("this model is patched already: call unpatch_lm_head(model) first to change its settings")
    head = model.get_output_embeddings()
    fused = FusedLMHead.from_linear(head, head_transforms(model.config))
    if gradient is not None:
        fused.gradient = gradient
    fused.stats = stats
    model.set_output_embeddings(fused)
    try:
        probe_head(model)
    except ValueError:
        model.set_output_embeddings(head)
        raise
    own = vars(model).get("forward")
    setattr(model, _PATCH, _Patch(own, head))
    before = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return before(*args, **kwargs)
        return _fused(self, output, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_lm_head` has been at it."""
    return hasattr(model, _PATCH)


def unpatch_lm_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model as `patch_lm_head` found it.

    Raises:
        ValueError: it is not patched.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> head = model.lm_head
        >>> unpatch_lm_head(patch_lm_head(model)).lm_head is head
        True
    """
    patch = vars(model).pop(_PATCH, None)
    if patch is None:
        raise ValueError("this model is not patched: there is nothing to undo")
    del model.forward
    if patch.forward is not None:
        model.forward = patch.forward
    fused = model.get_output_embeddings()
    # What was tied, moved or loaded meanwhile stays so.
    patch.head.weight, patch.head.bias = fused.weight, fused.bias
    model.set_output_embeddings(patch.head)
    return model


def _fused(
    model: PreTrainedModel,
    output: type[FusedLMOutput],
    *args: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> FusedLMOutput:
    # Looked up at every call: FSDP and PEFT replace modules.
    hidden = model.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
    labels = labels[:, 1:].to(hidden.device)
    mask = labels != IGNORED
    logps = model.get_output_embeddings()(hidden[mask], labels[mask])
    log_probs = logps.new_zeros(mask.shape).masked_scatter(mask, logps)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return output(loss=-logps.sum() / count.to(hidden.device), log_probs=log_probs, label_mask=mask)
