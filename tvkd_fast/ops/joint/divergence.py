"""Divergences between student and teacher, and other numbers of both, straight from hidden states.

Letters: N tokens, D hidden of the student, D' of the teacher, V vocabulary, V' of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.dispatch import Impl
from tvkd_fast.ops.gradient import GradMode, HeadGradient, HeadStats
from tvkd_fast.ops.joint.joint_op import joint_op
from tvkd_fast.ops.joint.outputs import KINDS, Kind, Output
from tvkd_fast.ops.joint.pair_input import joint_input
from tvkd_fast.ops.joint.sparse_joint_op import is_sparse, sparse_joint
from tvkd_fast.ops.joint.streamed_joint_op import is_streamed, streamed_joint


def linear_divergence(
    hidden: Tensor,
    weight: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | Head,
    *,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_index: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    rows: Tensor | None = None,
    grad_mode: GradMode = "exact",
    eps: float | None = None,
    row_cap: int | None = None,
    max_tail: float = 0.1,
    stats: HeadStats | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """A divergence between two softmaxes of each token, without ever holding [N, V] logits of either model.

    With p = softmax(z/τ) of the student, q = softmax(u/τ) of the teacher and m = (1 − β)p + βq:

        "forward_kl"       KL(q‖p)                        "skew_forward_kl"  KL(q‖m)
        "reverse_kl"       KL(p‖q)                        "skew_reverse_kl"  KL(p‖m)
        "jsd"              β·KL(q‖m) + (1 − β)·KL(p‖m)    "tvd"              ½ Σ|p − q|
                                                          "alpha"            Σ p^α·q^(1−α), 1 where p = q

    "jsd" is GKD's (arXiv 2306.13649), whose special cases are taken over: β = 0 is the forward KL and β = 1 the reverse
    KL, although the formula's own limit there is 0. The skew KLs are DistiLLM's (arXiv 2402.03898), whose α is β of the
    forward one and 1 − β of the reverse one; at β = 0 the forward one is KL(q‖p), at β = 1 the reverse one KL(p‖q).

    Args:
        hidden: [N, D] the student's states. bfloat16, float16, float32 or float64.
        weight: [V, D] the student's head, of hidden's dtype and device; or a `Head`, which has the transforms with it.
        teacher_hidden: [N, D'] the teacher's states of the same tokens, of any width and its own dtype.
        teacher_weight: [V, D'] the teacher's head, or a `Head`.
        kind: the divergence, by the names above.
        beta: β in [0, 1], the teacher's share of m.
        alpha: α in (0, 1), of "alpha".
        temperature: τ > 0; both models' logits are divided by it after their softcaps. The result is not multiplied
            by τ².
        bias, softcap, logit_scale: of the student's logits, as in `linear_logps`.
        teacher_bias, teacher_softcap, teacher_logit_scale: of the teacher's.
        teacher_index: (V,) integers, the teacher's row of each of the student's tokens, each at most once, where the
            vocabularies are not the same; q is then the teacher's softmax over these rows alone.
        teacher_lse: (N,) LSE(u/τ) where it is known (`linear_lse`), a constant; it saves the teacher's sums, and not
            its product.
        rows: (N,) bool, the rows to compute; the others' divergences are 0 and cost nothing on a CPU. All where None.
            In Triton, and on a GPU, they are walked through, and their states must be finite: 0·NaN would reach the
            weight's gradient.
        grad_mode: "exact", or "sparse": the same value, and a gradient by the student alone that is made of the entries
            with p ≥ ε or q ≥ ε (and the label's, where there is one), which the forward finds. What remains is spread
            evenly, so that the gradient sums to what the exact one sums to. Two products and what is gathered, whatever
            the upstream gradient is; in torch tiles on any device, without Triton kernels. "auto": sparse, and exact
            for a call with more entries than pay. docs/divergences.md has the errors.
        eps, row_cap, max_tail, stats: of a sparse gradient, as in `linear_logps`; row_cap None is V/8. What is left
            out of a row is of p's and q's probability the larger one.
        impl: "torch", "triton", or "auto", which takes Triton for CUDA and ROCm tensors of up to 32 bits. In Triton
            models of two dtypes are both computed in float32, and `teacher_lse` saves nothing.

    Returns:
        (N,) float32 (float64 for float64 inputs), nats, never negative. Differentiable once by the student's hidden,
        weight and bias, and by the teacher's where they require a gradient; what does not costs none. Six products for
        a student and a teacher of one width, forward and backward, the logits being computed twice (in Triton three
        times, eight products, but for the two KLs); `fused_linear_distillation_loss` takes four. Absolute error in
        float32 under 2e-6 at a KL up to 1. Memory beyond inputs, result and gradients is 128 MB by count, whatever N
        is, float32 sums of 16-bit gradients apart; in Triton a 64th of the device's memory, 1 GiB at most. In torch
        tiles one divergence whose gradient is hidden's alone (a frozen head) takes three products: the forward makes
        the gradient, and [N, D] of the result's dtype is kept for the backward, which rounds one more of 16 bits.

    Raises:
        ValueError: as `linear_logps`, of either model, which is named; rows that are not the same tokens'; vocabularies
            of different sizes without an index, an index with holes or repeats; β, α or τ out of range. On a CPU also a
            divergence that is infinite, since one model gives no probability to a token of the other's.
        RuntimeError: a second derivative, a forward-mode one, a torch.func transform.

    Examples:
        >>> import torch
        >>> hidden, weight = torch.eye(2, 4), torch.eye(5, 4)
        >>> linear_divergence(hidden, weight, torch.zeros(2, 8), torch.ones(5, 8))
        tensor([0.0954, 0.0954])
        >>> linear_divergence(hidden, weight, hidden, weight, kind="jsd")
        tensor([0., 0.])
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    found = linear_joint(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        outputs=(kind,),
        beta=beta,
        alpha=alpha,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        teacher_bias=teacher_bias,
        teacher_softcap=teacher_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_index=teacher_index,
        teacher_lse=teacher_lse,
        rows=rows,
        grad_mode=grad_mode,
        eps=eps,
        row_cap=row_cap,
        max_tail=max_tail,
        stats=stats,
        impl=impl,
    )
    return found[kind]


def linear_joint(
    hidden: Tensor,
    weight: Tensor | Head,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | Head | None = None,
    labels: Tensor | None = None,
    *,
    outputs: Sequence[Output],
    beta: float = 0.5,
    alpha: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_index: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    grad_mode: GradMode = "exact",
    eps: float | None = None,
    row_cap: int | None = None,
    max_tail: float = 0.1,
    stats: HeadStats | None = None,
    impl: Impl = "auto",
) -> dict[str, Tensor]:
    """Several numbers of each token from one walk over student's and teacher's vocabulary.

    One forward makes all of them, and one recomputation of the logits all their gradients, under whatever upstream
    gradients they get. Of the student's softmax p = softmax(z/τ) alone:

        "logps" log p of the label    "lse" LSE(z/τ)    "entropy" −Σ p log p    "log_sum_p2" log Σ p²

    of the teacher's "teacher_lse", LSE(u/τ); of both whatever `linear_divergence` names.

    Args:
        labels: (N,) int64 token ids in [0, V), or `ignore_index`; "logps" needs them. A row whose label is ignored is
            left out of every output: 0, and no gradient.
        outputs: the names, each once.

    All others are `linear_divergence`'s. Without a teacher only the student's own outputs can be had. Log-probabilities
    of the labels are at the temperature as well.

    Returns:
        The outputs by name, in the order asked for, (N,) each; dtype, memory and gradients as in `linear_divergence`.

    Raises:
        ValueError, RuntimeError: as `linear_divergence`; names that do not exist or come twice; "logps" without labels.

    Examples:
        >>> import torch
        >>> hidden, weight = torch.eye(2, 4), torch.eye(5, 4)
        >>> found = linear_joint(hidden, weight, labels=torch.tensor([0, 4]), outputs=("logps", "entropy"))
        >>> found["logps"]
        tensor([-0.9048, -1.9048])
    """
    gradient = HeadGradient(grad_mode=grad_mode, eps=eps, row_cap=row_cap, max_tail=max_tail)
    given = joint_input(
        "linear_joint",
        *(hidden, weight, teacher_hidden, teacher_weight, labels, outputs),
        beta=beta,
        alpha=alpha,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        teacher_bias=teacher_bias,
        teacher_softcap=teacher_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_index=teacher_index,
        teacher_lse=teacher_lse,
        rows=rows,
        ignore_index=ignore_index,
        impl=impl,
    )
    if is_sparse(given, gradient):
        values = sparse_joint(given, gradient, stats, impl)
    elif is_streamed(given):
        values = streamed_joint(given)
    else:
        values, _ = joint_op(*given.tensors, *given.settings)
    return dict(zip(given.outputs.names, values.unbind(0), strict=True))
