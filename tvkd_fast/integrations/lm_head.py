"""Patching one transformers model with the fused head, and unpatching it.

Letters: B rows, L row length, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from tvkd_fast.integrations.answer import FusedLMOutput, HeadSettings, is_empty
from tvkd_fast.integrations.patched import model_inside, patch_of, put_in, take_out, taken_out_outside
from tvkd_fast.models.head import check_head_layer, head_layers
from tvkd_fast.models.lent import undone
from tvkd_fast.models.probe import OwnAnswer, as_probed, compare_logps, own_answer, probe_ids, tolerance
from tvkd_fast.models.prune import few_layers
from tvkd_fast.ops import HeadGradient, HeadStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)


def patch_lm_head(
    model: Model,
    *,
    gradient: HeadGradient | None = None,
    stats: HeadStats | None = None,
    output: type[FusedLMOutput] = FusedLMOutput,
) -> Model:
    """Let `model(…, labels=labels, fused_lm_head=True)` answer with log-probabilities and a loss, and no logits.

    The head becomes a `FusedLMHead` where it stands, so that ties, hooks, optimizers and FSDP2 see what they saw; every
    other call is the model's own, one without labels among them. Only this model changes, and `unpatch_lm_head` puts
    back what was there. Copies and pickles of it are patched too, each for itself. A model that is patched already
    takes the new settings. Only positions with a label reach the head: labels [B, L] are shifted here, as transformers
    shifts them, and `shift_labels` [B, L] are taken as they are.

    Args:
        model: a causal language model, as it is or in what torch.compile, PEFT, data parallelism or accelerate put
            around it; on the meta device a few layers of its family are tried in its place.
        gradient: how it is differentiated; exact where not given (docs/sparse.md has the other kinds).
        stats: collects what sparse gradients were made of.
        output: the class of the answer.

    Returns:
        What was given.

    Raises:
        ValueError: its head is no plain linear layer, its logits are not what the family's config says (a head of its
            own making), or its loss is not that of its log-probabilities. Nothing is changed then.

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
    settings = HeadSettings(HeadGradient() if gradient is None else gradient, stats, output)
    _patch(model_inside(model), settings)
    return model


def _patch(model: PreTrainedModel, settings: HeadSettings) -> torch.dtype | None:
    """Probe and patch the model; returns the autocast dtype of its own forward, None where it has none."""
    quiet = HeadSettings(settings.gradient, None, FusedLMOutput)
    head = model.get_output_embeddings()
    if model.base_model is model or head is None or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is no causal language model with a backbone and a head of its own: give one"
        )
    for layer in head_layers(head):
        check_head_layer(layer, model)
    if is_empty(head):
        # Nothing can be computed without weights, and what is tried is the family's code.
        _patch(few_layers(model), quiet)
        put_in(model, settings, None)
        return None
    with undone(model, on_error=True):
        own = _own_answer(model)
        put_in(model, quiet, own.autocast)
        _compare(model, own)
        put_in(model, settings, own.autocast)
    return own.autocast


class LentHead:
    """A fused head that a lent model has only while it is called; raises ValueError as `patch_lm_head` does."""

    def __init__(self, model: nn.Module, settings: HeadSettings) -> None:
        self.settings = settings
        with undone(model_inside(model)):
            self._autocast = _patch(model_inside(model), settings)

    @contextmanager
    def asked(self, model: nn.Module) -> Iterator[None]:
        """Patch the model, or the one in its wrappers, while the block lasts."""
        inside = model_inside(model)
        with undone(inside):
            put_in(inside, self.settings, self._autocast)
            yield


def is_patched(model: nn.Module) -> bool:
    """Return whether the model is patched."""
    return patch_of(model_inside(model)) is not None


def unpatch_lm_head(model: Model) -> Model:
    """The model as `patch_lm_head` found it, with what it has learned, been loaded with or wrapped in since.

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
    inside = model_inside(model)
    if patch_of(inside) is None:
        if inside is model and taken_out_outside(inside):
            return model
        raise ValueError("this model is not patched: there is nothing to undo")
    take_out(inside, outside=inside is not model)
    return model


def _own_answer(model: PreTrainedModel) -> OwnAnswer:
    """The unpatched model's answer; ValueError where its logits do not come from its head."""
    own = own_answer(model, with_loss=True)
    if not own.calls_head:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) makes its logits without calling its output "
            "embeddings, where a fused head would stand: train it with a trainer that keeps its logits"
        )
    return own


@torch.no_grad()
def _compare(model: PreTrainedModel, own: OwnAnswer) -> None:
    """Raise ValueError where the patched model's answers differ from its own."""
    ids, precision = probe_ids(model), own.precision

    def logps(labels: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids.expand(2, -1), shift_labels=labels, fused_lm_head=True).log_probs
        return found

    with as_probed(model):
        compare_logps(model, own.logits, logps, precision)
        loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    if own.loss is None:
        return
    wanted, found = float(own.loss), float(loss)
    if not abs(found - wanted) <= tolerance(precision) * max(1.0, abs(wanted)):
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) has a loss of its own, {wanted:.5g}, and that of its "
            f"log-probabilities is {found:.5g}: set its loss_function or loss_type to that of causal language models, "
            "or train it with a trainer that keeps its logits"
        )
