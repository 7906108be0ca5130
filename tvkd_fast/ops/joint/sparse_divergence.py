"""`linear_sparse_divergence`: a divergence from what is kept of a teacher, its top k or its samples.

Letters: N tokens, D hidden, V vocabulary, k entries that are kept of each token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.checks import check_transforms, looks
from tvkd_fast.ops.dispatch import Impl
from tvkd_fast.ops.inputs import as_head, head_input
from tvkd_fast.ops.joint.backend import without_kernels
from tvkd_fast.ops.joint.listed_op import NAME, listed_op
from tvkd_fast.ops.joint.pair_input import check_numbers_per_row, check_temperature

SparseKind = Literal["forward_kl", "reverse_kl", "tvd"]
RestOfTeacher = Literal["even", "bucket"]
_KINDS = ("forward_kl", "reverse_kl", "tvd")
_TOLERANCE = 1e-3
"""By how much a row's probabilities may pass 1: what 16-bit ones are off by."""


def linear_sparse_divergence(
    hidden: Tensor,
    weight: Tensor | Head,
    ids: Tensor,
    probs: Tensor,
    *,
    tail: RestOfTeacher = "even",
    kind: SparseKind = "forward_kl",
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """A divergence of each token from a teacher of whom only some probabilities were kept.

    r = 1 − Σ probs is what the kept ones leave. tail="even" spreads r evenly over the other tokens, and compares all V;
    tail="bucket" compares k + 1 outcomes, the kept tokens and "any other". Samples are their tokens with their shares,
    which leave nothing: KL(q‖p) is then their negative log-likelihood less their entropy.

    Args:
        hidden, weight, bias, softcap, logit_scale: the student's, as in `linear_divergence`.
        ids: [N, k] integers in [0, V), each of a row once; −1 for none.
        probs: [N, k] the teacher's probabilities of these at the temperature, of any float dtype, each ≥ 0; 0 at −1.
        tail: "even" or "bucket".
        kind: "forward_kl" KL(q‖p); with a bucket also "reverse_kl" KL(p‖q) and "tvd" ½Σ|p − q|.
        temperature: τ > 0, by which the student's logits are divided.
        rows: as in `linear_divergence`.
        impl: "torch", or "auto", which is the same: no kernel computes it.

    Returns:
        (N,) float32 (float64 for float64 inputs), nats, not negative but for rounding. Differentiable once by hidden,
        weight and bias: one product forward and three backward. Memory beyond inputs, result and gradients is [N, k] a
        few times and 64 MB.

    Raises:
        ValueError, RuntimeError: as `linear_divergence`; ids or probabilities that are none, a token twice in a row; a
            divergence that is infinite; reverse KL and TVD with an even tail, which take all V logits of the teacher.

    Examples:
        >>> import torch
        >>> hidden, weight = torch.eye(2, 4), torch.eye(5, 4)
        >>> ids, probs = torch.tensor([[0, 1], [1, 4]]), torch.tensor([[0.7, 0.1], [0.6, 0.2]])
        >>> linear_sparse_divergence(hidden, weight, ids, probs)
        tensor([0.1833, 0.1348])
    """
    without_kernels(impl, NAME)
    check_temperature(temperature)
    if tail not in ("even", "bucket"):
        raise ValueError(f"tail must be one of even, bucket, got {tail!r}")
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if kind != "forward_kl" and tail == "even":
        raise ValueError(
            f"{kind} of an even tail takes all of the teacher's logits: take tail='bucket', or keep states"
        )
    hidden, head = head_input(hidden, as_head(weight, bias, softcap, logit_scale))
    check_transforms(NAME, hidden, head.weight, head.bias)
    check_numbers_per_row(hidden, rows=rows)
    _check_kept(hidden, head, ids, probs)
    logits, lse_rest, total_rest, *_ = listed_op(
        hidden, head.weight, head.bias, ids.long(), rows, head.softcap, head.logit_scale, temperature
    )
    q = probs.detach().to(logits.dtype)
    left = (1.0 - q.double().sum(1)).clamp_min(0.0).to(logits.dtype)
    others = head.vocab_size - (ids >= 0).sum(1)
    lse = torch.logsumexp(torch.cat([logits, lse_rest[:, None]], 1), 1)
    log_p, log_rest = logits - lse[:, None], lse_rest - lse
    if kind == "forward_kl":
        value = _weighted(q, q.log() - log_p).sum(1)
        if tail == "bucket":
            value = value + _weighted(left, left.log() - log_rest)
        else:
            even = left / others.clamp_min(1)
            value = value + _weighted(left, even.log() + lse) - _weighted(even, total_rest)
    elif kind == "reverse_kl":
        value = _weighted(log_p.exp(), log_p - q.log()).sum(1) + _weighted(log_rest.exp(), log_rest - left.log())
    else:
        value = 0.5 * ((log_p.exp() - q).abs().sum(1) + (log_rest.exp() - left).abs())
    if rows is not None:
        value = torch.where(rows, value, 0.0)
    _check_value(value, kind)
    return value


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    """p·x, 0 and without a gradient where p is 0."""
    return p * x.masked_fill(p == 0, 0.0)


def _check_kept(hidden: Tensor, head: Head, ids: Tensor, probs: Tensor) -> None:
    if ids.dim() != 2 or ids.shape != probs.shape or len(ids) != len(hidden):
        raise ValueError(
            f"ids and probs must be [{len(hidden)}, k], got {tuple(ids.shape)} and {tuple(probs.shape)}: the teacher's "
            "kept tokens of each row of hidden"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids are {ids.dtype}; int64 token ids are wanted")
    if not probs.is_floating_point():
        raise ValueError(f"probs are {probs.dtype}; a float dtype is wanted")
    for name, x in (("ids", ids), ("probs", probs)):
        if x.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device} and {name} on {x.device}: move one of them")
    if probs.device.type != "cpu" or torch.compiler.is_compiling():
        return
    sums = probs.double().sum(1)
    bad = (~(probs >= 0)).any(1) | (sums > 1.0 + _TOLERANCE) | ((probs > 0) & (ids < 0)).any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"probs of row {row} are not probabilities, sum {float(sums[row]):g}: each at least 0, together at most 1, "
            "and 0 where the id is -1; log-probabilities want exp first"
        )


def _check_value(value: Tensor, kind: str) -> None:
    if torch.compiler.is_compiling() or value.is_meta or not looks(value) or bool(value.isfinite().all()):
        return
    row = int((~value.isfinite()).nonzero()[0])
    raise ValueError(
        f"{kind} is {float(value.detach()[row])} in row {row}: one model's probability of a token, or of the tail, is "
        "0 where the other's is not, and the divergence has no gradient"
    )
