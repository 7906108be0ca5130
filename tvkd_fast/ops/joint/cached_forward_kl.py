"""Forward KL of a frozen head from two cached numbers of the teacher: exact, and without the teacher.

With z = (s/τ)·(h·w_j + b_j), which is linear in w_j,

    KL(q‖p) = LSE(z) − (s/τ)·(h·Σ_j q_j w_j + Σ_j q_j b_j) − H(q)        dKL/dh = (s/τ)·(Σ_j p_j w_j − Σ_j q_j w_j)

so that of the teacher's V probabilities D + 1 numbers are enough, as long as the student's head does not change.

Letters: N tokens, D hidden of the student, D' of the teacher, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.autocast import without_autocast
from tvkd_fast.ops.checks import check_finite, check_transforms, looks, naming
from tvkd_fast.ops.dispatch import Impl
from tvkd_fast.ops.inputs import as_head, head_input, is_trained
from tvkd_fast.ops.joint.backend import kept_rows, without_kernels
from tvkd_fast.ops.joint.pair_input import (
    check_index_range,
    check_numbers_per_row,
    check_temperature,
    check_vocabularies,
)
from tvkd_fast.ops.registered import differentiate_by_hidden
from tvkd_fast.ops.tiles.exact import accumulation_dtype, blocks
from tvkd_fast.ops.tiles.joint import expected_rows as means
from tvkd_fast.ops.tiles.joint.sides import Side

NAME = "linear_cached_forward_kl"
_IMPOSSIBLE = -1e-2
"""A KL below this, over 1 + |LSE(z)|, is no rounding, not of cached rows in bfloat16 either: it is another head's."""


_DOUBLES = 2**18
"""States that are float64 at a time: 2 MiB of each of two, and of their product."""


class ExpectedRows(NamedTuple):
    """What a forward KL takes of a teacher, for one student's head.

    Examples:
        >>> import torch
        >>> teacher, weight = (torch.zeros(2, 8), torch.ones(5, 8)), torch.eye(5, 4)
        >>> linear_expected_rows(*teacher, weight).rows[0]
        tensor([0.2000, 0.2000, 0.2000, 0.2000])
    """

    rows: Tensor
    """[N, D] Σ_j q_j·w_j of the student's rows."""
    entropy: Tensor
    """(N,) H(q), nats."""
    bias: Tensor | None = None
    """(N,) Σ_j q_j·b_j of the student's bias, where it has one; a token of q_j = 0 adds nothing, whatever b_j is."""


@torch.no_grad()
def linear_expected_rows(
    teacher_hidden: Tensor,
    teacher_weight: Tensor | Head,
    weight: Tensor | Head,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_index: Tensor | None = None,
    impl: Impl = "auto",
) -> ExpectedRows:
    """Σ_j q_j·w_j and H(q) of each token: what `linear_cached_forward_kl` needs of a teacher. No gradient.

    Args:
        teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale, teacher_index: as in
            `linear_divergence`.
        weight: [V, D] the student's frozen head, or a `Head`, which has no softcap.
        temperature: τ > 0, of both models.
        bias: (V,) the student's, or None.
        impl: as in `linear_divergence`.

    Returns:
        `ExpectedRows`, float32 (float64 for float64 inputs): 4·(D + 1) bytes a token, half of that in bfloat16. A
        product of the teacher's and one of the student's; memory as in `linear_divergence`.

    Raises:
        ValueError: as `linear_divergence`; a softcap of the student's; on a CPU a bias of −inf at a token to which the
            teacher gives a probability.

    Examples:
        >>> import torch
        >>> found = linear_expected_rows(torch.zeros(2, 8), torch.ones(5, 8), torch.eye(5, 4))
        >>> found.entropy
        tensor([1.6094, 1.6094])
    """
    without_kernels(impl, "linear_expected_rows")
    check_temperature(temperature)
    head = as_head(weight, bias)
    _check_softcap(head)
    with naming("teacher"):
        teacher_hidden, teacher = head_input(
            teacher_hidden, as_head(teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
        )
    with naming("student"):
        _, head = head_input(head.weight[:0], head)
    check_vocabularies(head, teacher, teacher_index, teacher_hidden)
    check_index_range(teacher_index, teacher.vocab_size)
    index = None if teacher_index is None else teacher_index.long()
    every = torch.arange(len(teacher_hidden), device=teacher_hidden.device)
    with without_autocast(teacher_hidden):
        found = means.teacher_means(Side(teacher_hidden, teacher, temperature, index), head, every)
    with naming("teacher"):
        check_finite(found.entropy, teacher_hidden, teacher.weight, teacher.bias)
    _check_means(found, head)
    return ExpectedRows(found.rows, found.entropy, None if head.bias is None else found.bias)


def linear_cached_forward_kl(
    hidden: Tensor,
    weight: Tensor | Head,
    expected_rows: Tensor,
    teacher_entropy: Tensor,
    expected_bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """KL(q‖p) of each token from what `linear_expected_rows` has kept of the teacher: exact, by a head that is frozen.

    Args:
        hidden: [N, D] the student's states.
        weight: [V, D] its head, frozen (LoRA, frozen embeddings), or a `Head`: the one that the rows are means of.
        expected_rows: [N, D] Σ_j q_j·w_j, of any float dtype; bfloat16 costs as much as bfloat16 states do.
        teacher_entropy: (N,) H(q).
        expected_bias: (N,) Σ_j q_j·b_j, where the head has a bias.
        temperature: τ > 0, the one that the rows were made at.
        bias, logit_scale: of the student's logits, as in `linear_logps`.
        softcap: refused.
        rows, impl: as in `linear_divergence`.

    Returns:
        (N,) float32 (float64 for float64 inputs), nats, never negative. Differentiable once by hidden. Two products,
        forward and backward: dKL/dh is made in the forward, [N, D] of the result's dtype, and kept. Where hidden
        requires no gradient, or none is recorded, one product, and nothing is kept. Memory beyond inputs, result,
        gradient and that is 128 MB by count; of 16 bits the backward rounds one more [N, D].

    Raises:
        ValueError, RuntimeError: as `linear_divergence`; a softcap, with which logits are not linear in the head's
            rows; a weight or bias that requires a gradient. On a CPU also rows of another head, where they show it, by
            a divergence below 0.

    Examples:
        >>> import torch
        >>> hidden, weight, teacher = torch.eye(2, 4), torch.eye(5, 4), (torch.zeros(2, 8), torch.ones(5, 8))
        >>> linear_cached_forward_kl(hidden, weight, *linear_expected_rows(*teacher, weight))
        tensor([0.0954, 0.0954])
    """
    without_kernels(impl, NAME)
    check_temperature(temperature)
    hidden, head = head_input(hidden, as_head(weight, bias, softcap, logit_scale))
    check_transforms(NAME, hidden, head.weight, head.bias)
    _check_softcap(head)
    if torch.is_grad_enabled() and is_trained(head):
        raise ValueError(
            "the head requires a gradient, and the cached rows are means of one that does not change: freeze it "
            "(requires_grad_(False)), or take linear_divergence, which asks the teacher"
        )
    if expected_rows.shape != hidden.shape or expected_rows.device != hidden.device:
        raise ValueError(
            f"expected_rows must be {list(hidden.shape)} on {hidden.device}, got {list(expected_rows.shape)} on "
            f"{expected_rows.device}: what linear_expected_rows makes of these tokens and this head"
        )
    if (expected_bias is None) != (head.bias is None):
        raise ValueError("expected_bias and bias go together: linear_expected_rows makes one where the head has one")
    check_numbers_per_row(hidden, rows=rows, teacher_entropy=teacher_entropy, expected_bias=expected_bias)
    value: Tensor = cached_kl_op(
        hidden,
        head.weight,
        head.bias,
        expected_rows.detach(),
        teacher_entropy.detach(),
        None if expected_bias is None else expected_bias.detach(),
        rows,
        head.logit_scale / temperature,
        torch.is_grad_enabled() and hidden.requires_grad,
    )[0]
    return value


def _check_means(found: means.TeacherMeans, head: Head) -> None:
    """Means of the student's rows and bias that are finite."""
    ends = torch.stack(found.rows.aminmax(dim=1))
    with naming("student"):
        for x in (ends, found.bias):
            check_finite(x, head.weight[:0], head.weight, head.bias)
    if looks(found.bias) and len(bad := found.bias.isinf().nonzero()[:, 0]):
        raise ValueError(
            f"the student's bias is infinite at a token that the teacher gives a probability in row {int(bad[0])}, and "
            "so is the forward KL: give the teacher the same teacher_bias, or leave the token in"
        )


def _check_softcap(head: Head) -> None:
    if head.softcap is not None:
        raise ValueError(
            "the student has a softcap, with which its logits are not linear in the head's rows: Σ_j q_j·z_j is not "
            "h·Σ_j q_j·w_j, and no cached mean of rows gives it; take linear_divergence"
        )


def _cached_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expected_rows: Tensor,
    teacher_entropy: Tensor,
    expected_bias: Tensor | None,
    rows: Tensor | None,
    scale: float,
    want_derivative: bool,
) -> tuple[Tensor, Tensor]:
    """KL(q‖p) (N,) and dKL/dh [N, D], 0 in rows that are left out; no derivative, (0,), where none is wanted."""
    acc = accumulation_dtype(hidden.dtype)
    kept = kept_rows(None, rows, 0)
    place = torch.arange(len(hidden), device=hidden.device) if kept is None else kept
    found, lse = hidden.new_zeros((2, len(hidden)), dtype=torch.float64)
    slopes = hidden.new_zeros(_derivative_shape(hidden, want_derivative), dtype=acc)
    with without_autocast(hidden):
        head = Head(weight, bias, None, scale)
        for here, own in means.own_means(hidden, head, place, with_rows=want_derivative):
            # In float64: large numbers whose difference is small.
            found[here] = lse[here] = own.maximum + own.log_total
            for part in blocks(len(here), max(1, _DOUBLES // hidden.shape[1])):
                some = here[part]
                found[some] -= scale * torch.linalg.vecdot(hidden[some].double(), expected_rows[some].double())
                if own.rows is not None:
                    slopes[some] = own.rows[part].sub_(expected_rows[some]).mul_(scale)
        found[place] -= teacher_entropy[place].double()
        if expected_bias is not None:
            found[place] -= scale * expected_bias[place].double()
    if kept is None and rows is not None:
        found.masked_fill_(~rows, 0.0)
        if want_derivative:
            slopes.masked_fill_(~rows[:, None], 0.0)
    value = found.to(acc)
    check_finite(value, hidden, weight, bias)
    if looks(value):
        bad = (found < _IMPOSSIBLE * (1.0 + lse.abs())).nonzero()[:, 0]
        if len(bad):
            raise ValueError(
                f"the divergence is {float(found[bad[0]]):.3g} in row {int(bad[0])}: expected_rows and "
                "teacher_entropy are not of this head, these tokens or this temperature; make them again"
            )
    return value.clamp_min_(0.0), slopes


def _derivative_shape(hidden: Tensor, wanted: bool) -> tuple[int, ...]:
    return tuple(hidden.shape) if wanted else (0,)


cached_kl_op = torch.library.custom_op("tvkd_fast::cached_forward_kl", _cached_kl, mutates_args=())


@cached_kl_op.register_fake
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    shape = _derivative_shape(hidden, args[-1])
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(shape, dtype=dtype)


differentiate_by_hidden(cached_kl_op, lambda inputs: inputs[6], name=NAME)
