"""The choice of the implementation that computes a call: `impl` is resolved once, into a backend of a few functions."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch import Tensor

from tvkd_fast._compat import constant_in_graphs
from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums

Impl = Literal["auto", "torch", "triton"]
IMPLEMENTATIONS = ("auto", "torch", "triton")

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger("tvkd_fast")


class Backend(Protocol):
    """The functions of an implementation of the head: `torch_backend` and `triton_backend` are such modules."""

    def head_sums(
        self,
        hidden: Tensor,
        head: Head,
        *,
        labels: Tensor | None = None,
        ignore_index: int = -100,
        kappa: float | None = None,
        entropy: bool = False,
    ) -> HeadSums:
        """Statistics of hidden [N, D], each (N,). The numbers of a row whose label is ignored mean nothing."""

    def logps_forward(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        *,
        ignore_index: int,
        workspace_mb: int,
        streamed: bool,
    ) -> tuple[HeadSums, Tensor]:
        """`head_sums` with labels, and what the same pass leaves for the backward, in the dtype of the sums.

        Where `streamed`, dlogp_t/dh_t [N, D], 0 where a label is ignored; else logits [S, V] of as many rows as the
        workspace holds, of Triton's exponentials in hidden's dtype.
        """

    def logps_gradients(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        sums: HeadSums,
        grad_logps: Tensor,
        *,
        logits: Tensor,
        ignore_index: int,
        want_hidden: bool,
        want_weight: bool,
        want_bias: bool,
    ) -> HeadGradients:
        """Exact gradients of Σ_t grad_logps_t·logp_t; `sums` and `logits` as `logps_forward` returned them."""


def check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def resolve(impl: str, hidden: Tensor) -> str:
    """ "torch" or "triton". ValueError for another name, and for a "triton" that is not available here."""
    check_impl(impl)
    if impl != "auto":
        refusal = _no_triton(hidden.device, hidden.dtype) if impl == "triton" else None
        if refusal:
            raise ValueError(f"impl='triton' cannot be had: {refusal}")
        return impl
    return "triton" if _prefers_triton(hidden.device, hidden.dtype) else "torch"


def backend(impl: str) -> Backend:
    """The functions of a resolved implementation."""
    # Imported when asked for: the Triton one needs triton.
    if impl == "triton":
        from tvkd_fast.ops import triton_backend

        return triton_backend
    from tvkd_fast.ops import torch_backend

    return torch_backend


@constant_in_graphs
def _prefers_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Answered while a graph is traced, and not in it: a graph can neither look for Triton nor log its choice."""
    return _auto(device, dtype)


@lru_cache
def _auto(device: torch.device, dtype: torch.dtype) -> bool:
    """Logged once per device and dtype: as information where it is as expected, as a warning for an unused GPU."""
    if device.type == "cpu":
        _log.info("impl='auto' computes the head in torch tiles: the tensors are on the CPU")
        return False
    refusal = _no_triton(device, dtype)
    if refusal:
        _log.warning("impl='auto' computes the head in torch tiles: %s", refusal)
    else:
        _log.info("impl='auto' computes the head in Triton kernels: %s tensors of %s", device, dtype)
    return refusal is None


@constant_in_graphs
def _no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot take such tensors, and the remedy; None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton, on Linux); take impl='torch'"
    from tvkd_fast.kernels import launch

    if dtype not in _TRITON_DTYPES:
        return f"the kernels compute in float32, bfloat16 and float16, got {dtype}; cast, or take impl='torch'"
    if launch.INTERPRETED:
        return None if dtype != torch.bfloat16 else "Triton's interpreter multiplies bfloat16 wrongly; use float32"
    return launch.refusal(device)
