"""The fused head in a transformers model as it stands: one model at a time, put in and taken out by a call.

Letters: B rows, L row length, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tvkd_fast.integrations.answer import FusedLMOutput, HeadSettings, check_head, fuse, is_empty
from tvkd_fast.integrations.patched import model_inside, patch_of, put_in, take_out
from tvkd_fast.models import FusedLMHead, head_transforms
from tvkd_fast.models.probe import as_probed, compare_logps, probe_ids, tolerance
from tvkd_fast.models.prune import few_layers
from tvkd_fast.ops import HeadGradient, HeadStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)
_UNDONE_OUTSIDE: WeakSet[nn.Module] = WeakSet()
"""Models that were unpatched by way of what is wrapped around them: whoever holds the model itself may do so too."""


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
    inside = model_inside(model)
    settings = HeadSettings(HeadGradient() if gradient is None else gradient, stats, output)
    quiet = HeadSettings(settings.gradient, None, FusedLMOutput)
    head = inside.get_output_embeddings()
    if inside.base_model is inside or head is None or inside.config.is_encoder_decoder:
        raise ValueError(
            f"{type(inside).__name__} is no causal language model with a backbone and a head of its own: give one"
        )
    check_head(head)
    empty = is_empty(head)
    if empty:
        # Nothing can be computed without weights, and what is tried is the family's code.
        patch_lm_head(few_layers(inside), gradient=gradient)
    with _undone_on_error(inside):
        own = None if empty else _own_answer(inside)
        fuse(head, head_transforms(inside.config), quiet)
        put_in(inside, quiet, None if own is None else own.autocast)
        if own is not None:
            _compare(inside, own)
        fuse(head, head_transforms(inside.config), settings)
        put_in(inside, settings, None if own is None else own.autocast)
    _UNDONE_OUTSIDE.discard(inside)
    return model


@contextmanager
def answering(model: nn.Module, *, output: type[FusedLMOutput]) -> Iterator[None]:
    """Patched while the block lasts: a lent model that `patch_lm_head` has taken before, which is not tried again."""
    inside = model_inside(model)
    if patch_of(inside) is not None:
        yield
        return
    settings = HeadSettings(HeadGradient(), None, output)
    fuse(inside.get_output_embeddings(), head_transforms(inside.config), settings)
    put_in(inside, settings, None)
    try:
        yield
    finally:
        unpatch_lm_head(inside)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_lm_head` has been at it."""
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
        if inside is model and inside in _UNDONE_OUTSIDE:
            _UNDONE_OUTSIDE.discard(inside)
            return model
        raise ValueError("this model is not patched: there is nothing to undo")
    for module in inside.modules():
        if isinstance(module, FusedLMHead):
            module.as_linear()
    take_out(inside)
    if inside is not model:
        _UNDONE_OUTSIDE.add(inside)
    return model


@contextmanager
def _undone_on_error(model: PreTrainedModel) -> Iterator[None]:
    """Whatever is raised, the model's own attributes and its heads are as they were before."""
    carried = dict(vars(model))
    heads = [(module, dict(vars(module))) for module in model.modules() if isinstance(module, FusedLMHead)]
    try:
        yield
    except BaseException:
        fused = {module for module, _ in heads}
        for module in model.modules():
            if isinstance(module, FusedLMHead) and module not in fused:
                module.as_linear()
        for module, attributes in [(model, carried), *heads]:
            vars(module).clear()
            vars(module).update(attributes)
        raise


@dataclass(frozen=True)
class _OwnAnswer:
    """What a model says of the probe's tokens by itself."""

    logits: Tensor
    """[T, V]"""
    loss: Tensor | None
    """For its own tokens as labels."""
    precision: torch.dtype
    """In which its head answered."""
    autocast: torch.dtype | None
    """What its own forward multiplies in, where it brings mixed precision."""


@torch.no_grad()
def _own_answer(model: PreTrainedModel) -> _OwnAnswer:
    """By a plain call, before anything is changed; ValueError where there is none."""
    ids = probe_ids(model)
    kind = ids.device.type
    seen: list[tuple[torch.dtype, torch.dtype | None]] = []

    def note(_head: nn.Module, _inputs: Any, logits: Tensor) -> None:
        seen.append((logits.dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None))

    # Before FSDP2's own hook, which may cast them.
    handle = model.get_output_embeddings().register_forward_hook(note, prepend=True)
    try:
        with as_probed(model):
            out = model(input_ids=ids, labels=ids, use_cache=False)
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called with input_ids and labels as it is: {error}. Patch it once it can"
        ) from error
    finally:
        handle.remove()
    if not seen:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) makes its logits without calling its output "
            "embeddings, where a fused head would stand: train it with a trainer that keeps its logits"
        )
    return _OwnAnswer(out.logits[0], out.loss, *seen[0])


@torch.no_grad()
def _compare(model: PreTrainedModel, own: _OwnAnswer) -> None:
    """Raise ValueError where the patched model's answers are not those that it had by itself."""
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
