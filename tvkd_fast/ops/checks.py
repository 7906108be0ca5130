"""The refusals of the ops, and their messages. Checks that would make a GPU wait are made on CPU tensors only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tvkd_fast._compat import in_functorch, is_dtensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMED_ROWS = 8
FLATTEN = "flatten it into the rows of [N, D], hidden.flatten(0, -2)"


def check_tensors(**inputs: Any) -> None:
    """Refuse a layer that is given in place of its weight, before its attributes are read."""
    for name, x in inputs.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}, and a tensor is wanted: of a head give lm_head.weight")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> None:
    """hidden [N, D] and weight [V, D] (bias (V,)) of one dtype on one device, with transforms that mean something."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if is_dtensor(tensor):
            raise ValueError(
                f"{name} is a DTensor: reading a sharded head from outside its module gives wrong gradients. Call "
                "FusedLMHead(hidden, labels) (tvkd_fast.models.FusedLMHead) so that FSDP2's hooks gather the weight."
            )
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}: "
            "flatten batch and time first, hidden.flatten(0, -2)"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has size {hidden.shape[1]} and weight {weight.shape[1]}: they are not of the same model, "
            "or the weight is transposed ([V, D] is wanted)"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight is empty: {tuple(weight.shape)}; a head has at least one token and one dimension")
    if hidden.dtype not in _FLOATS:
        raise ValueError(f"hidden is {hidden.dtype}; float16, bfloat16, float32 or float64 is wanted")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype:
            raise ValueError(
                f"hidden is {hidden.dtype} and {name} {tensor.dtype}: cast one of them to the other's dtype"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device} and {name} on {tensor.device}: move one of them")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), one a vocabulary row, got {tuple(bias.shape)}")
    if softcap is not None and not (0 < softcap < math.inf):
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    # Compared, since torch.compile traces a float that changes through comparisons and not through math.isfinite.
    if not (-math.inf < logit_scale < math.inf) or logit_scale == 0:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")


def check_transforms(op: str, *tensors: Tensor | None) -> None:
    """No torch.func transform is under way and no tensor carries a forward-mode tangent, which an op would drop."""
    if in_functorch():
        raise RuntimeError(
            f"{op} takes no torch.func transform (grad, vjp, jvp, vmap): take torch.autograd.grad or backward() for a "
            f"gradient; for a batch {FLATTEN}"
        )
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors if isinstance(x, Tensor)):
        raise RuntimeError(f"{op} has no forward-mode derivative: take torch.autograd.grad or backward()")


def no_vmap(op: str) -> Callable[..., Any]:
    """Return the vmap rule that an op registers: a refusal, where torch would run the op once per example."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError(f"{op} has no vmap: {FLATTEN}")

    return refuse


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    """labels (N,) integers on hidden's device."""
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"labels must be ({hidden.shape[0]},), one per row of hidden, got {tuple(labels.shape)}: hidden[t] is the "
            "state that predicts labels[t], shifted already"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels are {labels.dtype}; int64 token ids are wanted")
    if labels.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} and labels on {labels.device}: move one of them")


def check_label_range(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """labels in [0, V) or ignore_index. On a GPU, where looking would wait, one out of range gives NaN instead."""
    if labels.device.type != "cpu":
        return
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if bad.any():
        raise ValueError(
            f"labels out of range in {_rows(bad)}: {labels[bad][:_NAMED_ROWS].tolist()} not in [0, {vocab_size}) and "
            f"not ignore_index={ignore_index}; does the tokenizer belong to this model?"
        )


_LOOKS = ContextVar("looks", default=True)


@contextmanager
def unchecked() -> Iterator[None]:
    """Hand NaN and inf through: the caller looks at what it makes of them, as a training step does.

    On a device other than the CPU nothing is looked at either for which the host would wait.
    """
    token = _LOOKS.set(False)
    try:
        yield
    finally:
        _LOOKS.reset(token)


def waits(x: Tensor) -> bool:
    """Return whether a number of x may be looked at: always on a CPU, elsewhere unless `unchecked`."""
    return _LOOKS.get() or x.device.type == "cpu"


def looks(result: Tensor) -> bool:
    """Return whether NaN and inf of a result are looked for: on a CPU, unless `unchecked`."""
    return _LOOKS.get() and result.device.type == "cpu"


def check_finite(result: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Name the rows behind a NaN or inf in `result`. One look at N floats; the inputs are searched only when needed.

    An infinite result is no error by itself: a bias of -inf takes a token out of the vocabulary.
    """
    if not looks(result) or result.isfinite().all():
        return
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        # aminmax hands NaN and inf through and, unlike a mask or a float64 sum, makes no copy of a head in memory.
        low, high = tensor.detach().aminmax(dim=1)
        bad = ~(low.isfinite() & high.isfinite())
        if bad.any():
            raise ValueError(
                f"{name} has NaN or inf in {_rows(bad)}: the forward pass that made it overflowed or its weights are "
                "broken; look at the learning rate, the dtype (float16 overflows at 65,504) and the checkpoint"
            )
    if not result.isnan().any():
        return
    if bias is not None:
        bad = bias.detach().isnan() | bias.detach().isposinf()
        if bad.any():
            raise ValueError(f"bias has NaN or inf in {_rows(bad)}: look at the learning rate and the checkpoint")
        if bias.detach().isneginf().all():
            raise ValueError("bias is -inf everywhere: a head has at least one token")
    raise ValueError(
        "the head's logits overflow although hidden and weight are finite: use float32, or a smaller scale"
    )


def _rows(mask: Tensor) -> str:
    rows = mask.nonzero()[:, 0].tolist()
    shown = ", ".join(map(str, rows[:_NAMED_ROWS]))
    more = f" and {len(rows) - _NAMED_ROWS} more" if len(rows) > _NAMED_ROWS else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


@contextmanager
def naming(model: str) -> Iterator[None]:
    """Several heads pass the same checks: a refusal names the head."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the {model}'s {error}") from error
