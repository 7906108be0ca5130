"""Divergences over a vocabulary that processes share: each walks its own rows of both heads, and their numbers merge.

With P_r and Q_r the shares of p and q that lie in process r's rows, P_r = exp(lse_r − lse), and p_r, q_r the softmaxes
of those rows alone,

    KL(q‖p) = Σ_r Q_r·(KL(q_r‖p_r) + log Q_r/P_r)        H(p) = Σ_r P_r·(H(p_r) − log P_r)
    Σ p^α·q^(1−α) = Σ_r P_r^α·Q_r^(1−α)·Σ p_r^α·q_r^(1−α)        log Σ p² = log Σ_r P_r²·Σ p_r²

so that a few numbers a token travel, and both gradients are those of the whole vocabulary. A mixture of p and q has no
such parts: JSD, the skew KLs and TVD are refused.

Letters: S processes of a group, N tokens of one of them and M of all, D hidden of each model, L local numbers, O
outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tvkd_fast.distributed.vocabulary import Rows, SharedHead, gathered_states
from tvkd_fast.ops import Head, linear_joint

_LOCAL = ("lse", "teacher_lse")
"""What every merge takes, beside the outputs themselves."""
_MERGED = ("lse", "teacher_lse", "entropy", "log_sum_p2", "forward_kl", "reverse_kl", "alpha")
_REMEDY = "set --parallel.vocabulary gathered"


def shared_joint(
    head: SharedHead,
    hidden: Tensor,
    teacher_hidden: Tensor,
    teacher: Head | SharedHead,
    *,
    outputs: Sequence[str],
    alpha: float = 0.5,
    temperature: float = 1.0,
    rows: Tensor | None = None,
) -> dict[str, Tensor]:
    """`linear_joint` of a head that is shared, for the same call of every process together.

    Args:
        head: the student's; its transforms and gradient (exact or sparse: ε is then of the own rows' softmaxes).
        hidden: [N, D] this process's states; N may differ from process to process.
        teacher_hidden: [N, D'] the teacher's, a constant.
        teacher: its head, a constant: whole in every process, of which each reads the rows that it has of the
            student's; or shared by the same processes.
        outputs: names among lse, teacher_lse, entropy, log_sum_p2, forward_kl, reverse_kl, alpha. Log-probabilities are
            `head(hidden, labels)`.
        alpha, temperature, rows: as in `linear_joint`.

    Returns:
        The outputs by name, (N,) each. Losses are to be multiplied by the number of processes, as FSDP2 averages.

    Raises:
        ValueError: as `linear_joint`; outputs that are no sums over parts of a vocabulary; a teacher that is shared
            otherwise, or of another size.
    """
    names = tuple(outputs)
    if refused := [name for name in names if name not in _MERGED]:
        raise ValueError(
            f"{refused[0]} is not made of parts of a vocabulary that is shared (it has {', '.join(_MERGED)}): {_REMEDY}"
        )
    own_rows, count = head.rows, hidden.shape[0]
    longest = own_rows.longest(count, hidden.device)
    own_teacher = _own_teacher(head, teacher)
    dtype = hidden.dtype if head.dtype is None else head.dtype
    states = gathered_states(hidden.to(dtype), longest, own_rows)
    others = own_rows.all_gather(pad(teacher_hidden.detach(), (0, 0, 0, longest - count)))
    weight = own_rows.own(head.weight).to(dtype)
    here = hidden.new_ones(count, dtype=torch.int64) if rows is None else rows.long()
    asked = own_rows.all_gather(pad(here, (0, longest - count))) > 0
    local = tuple(dict.fromkeys((*_LOCAL, *names)))
    if own_rows.count:
        bias = None if head.bias is None else head.bias[own_rows.first : own_rows.first + own_rows.count].to(dtype)
        own_head = Head(weight, bias, head.transforms.softcap, head.transforms.logit_scale)
        found = linear_joint(
            *(states, own_head, others, own_teacher),
            outputs=local,  # type: ignore[arg-type]
            alpha=alpha,
            temperature=temperature,
            rows=asked,
            **_gradient(head),
        )
        numbers = torch.stack([found[name] for name in local])
    else:
        # Tied to what others have a gradient of: every process takes part in their collectives.
        nothing = states.sum(1).float() * 0 + weight.sum() * 0
        numbers = torch.stack([nothing - torch.inf if name in _LOCAL else nothing for name in local])
    mine = slice(own_rows.rank * longest, own_rows.rank * longest + count)
    merged: Tensor = _MergedJoint.apply(numbers, own_rows, mine, local, names, alpha)
    if rows is not None:
        merged = merged.masked_fill(~rows, 0.0)
    return dict(zip(names, merged.unbind(0), strict=True))


def _gradient(head: SharedHead) -> dict[str, Any]:
    options = head.gradient_options()
    return {name: options[name] for name in ("grad_mode", "eps", "row_cap", "max_tail", "stats")}


def _own_teacher(head: SharedHead, teacher: Head | SharedHead) -> Head:
    """The teacher's rows of the tokens that this process has of the student's, detached."""
    own_rows = head.rows
    size = teacher.weight.shape[0]
    if size != head.weight.shape[0]:
        raise ValueError(
            f"the student's vocabulary has {head.weight.shape[0]} tokens and the teacher's {size}: cut both heads to "
            "the tokens that they share before they are shared"
        )
    if not isinstance(teacher, SharedHead):
        own = teacher.columns(own_rows.first, own_rows.first + own_rows.count)
        return Head(own.weight.detach(), None if own.bias is None else own.bias.detach(), own.softcap, own.logit_scale)
    if (teacher.rows.first, teacher.rows.count) != (own_rows.first, own_rows.count):
        raise ValueError("the teacher's head is shared otherwise than the student's: share both over the same mesh")
    weight = teacher.weight.detach().to_local()  # type: ignore[attr-defined]
    bias = None if teacher.bias is None else teacher.bias.detach()[own_rows.first : own_rows.first + own_rows.count]
    return Head(weight, bias, teacher.transforms.softcap, teacher.transforms.logit_scale)


def merge(numbers: Tensor, local: tuple[str, ...], outputs: tuple[str, ...], alpha: float) -> Tensor:
    """[O, M] of every process's local numbers [S, L, M], in float64, summed in the processes' order."""
    by_name = dict(zip(local, numbers.double().unbind(1), strict=True))
    # A process without rows, or with none that the teacher has, adds nothing.
    lse, teacher_lse = (by_name[name].logsumexp(0) for name in _LOCAL)
    log_p, log_q = by_name["lse"] - lse, by_name["teacher_lse"] - teacher_lse
    has_p, has_q = log_p > -torch.inf, log_q > -torch.inf
    log_p, log_q = log_p.where(has_p, 0.0), log_q.where(has_q, 0.0)
    p, q = log_p.exp().where(has_p, 0.0), log_q.exp().where(has_q, 0.0)
    found = {"lse": lse, "teacher_lse": teacher_lse}
    for name in outputs:
        own = by_name[name]
        if name == "entropy":
            found[name] = (p * (own - log_p)).sum(0)
        elif name == "log_sum_p2":
            found[name] = (own.where(has_p, -torch.inf) + 2.0 * log_p).logsumexp(0)
        elif name == "forward_kl":
            found[name] = (q * (own + log_q - log_p)).sum(0)
        elif name == "reverse_kl":
            found[name] = (p * (own + log_p - log_q)).sum(0)
        elif name == "alpha":
            found[name] = (p**alpha * q ** (1.0 - alpha) * own).sum(0)
    return torch.stack([found[name] for name in outputs])


class _MergedJoint(torch.autograd.Function):
    """Local numbers [L, M] to the outputs [O, N] of the own tokens. Back, each process's own, which it can do alone."""

    @staticmethod
    def forward(
        ctx: Any,
        numbers: Tensor,
        rows: Rows,
        mine: slice,
        local: tuple[str, ...],
        outputs: tuple[str, ...],
        alpha: float,
    ) -> Tensor:
        every = rows.all_gather(numbers[None])
        ctx.save_for_backward(every)
        ctx.rows, ctx.settings = rows, (local, outputs, alpha)
        return merge(every, *ctx.settings)[:, mine].to(numbers.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (every,) = ctx.saved_tensors
        rows = ctx.rows
        longest = every.shape[2] // rows.size
        upstream = rows.all_gather(pad(gradient, (0, longest - gradient.shape[1]))[None])
        # [S, O, n] of the processes' own tokens, in their order.
        upstream = upstream.transpose(0, 1).flatten(1)
        with torch.enable_grad():
            leaf = every.detach().requires_grad_()
            (found,) = torch.autograd.grad(merge(leaf, *ctx.settings), leaf, upstream.double())
        return found[rows.rank], None, None, None, None, None
