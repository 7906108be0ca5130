"""Step 2, the kernels over two heads: the sums of both, of mixtures of them, and dlogits.

p = softmax(z) is the student's, q = softmax(u) the teacher's, m = (1 − β')p + β'q.

Letters: N tokens, D hidden (E the teacher's), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import triton
from torch import Tensor

from bench.harness.checker import largest, relative
from bench.minutes.alone.problem import NATS, Problem
from bench.minutes.cases import Row, judged
from tvkd_fast.kernels.autotune import joint_tiles
from tvkd_fast.kernels.joint_backward import factors_of
from tvkd_fast.kernels.joint_dlogits import joint_dlogits
from tvkd_fast.kernels.joint_stats import joint_sums
from tvkd_fast.kernels.joint_values import joint_values
from tvkd_fast.kernels.records import Head, JointSums, JointValues

BETA, ALPHA = 0.3, 0.6


class Teacher:
    """A second head over a problem's vocabulary, wider by half, with its states; everything of both in float64."""

    def __init__(self, of: Problem) -> None:
        self.of = of
        n, d, v = of.shape
        draw = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        wide = d // 16 * 24
        self.hidden = of.memory.copied(normal(n, wide).to(of.hidden))
        self.head = Head(of.memory.copied((normal(v, wide) * 3 / wide**0.5).to(of.hidden)))
        self.inputs = (of.hidden, of.head, self.hidden, self.head)

    @cached_property
    def u(self) -> Tensor:
        """[N, V] logits."""
        return self.hidden.double() @ self.head.weight.double().T

    @cached_property
    def logs(self) -> tuple[Tensor, Tensor]:
        """[N, V] log p and log q."""
        return self.of.z.log_softmax(1), self.u.log_softmax(1)

    @cached_property
    def sums(self) -> JointSums:
        """By the kernel of a first walk, which has a case of its own."""
        return joint_sums(*self.inputs, labels=self.of.labels, entropy=True, squares=True)

    @cached_property
    def values(self) -> JointValues:
        return joint_values(
            *self.inputs, self.sums, labels=self.of.labels, beta=BETA, variation=True, alpha=ALPHA
        )  # fmt: skip


def first_walk(of: Problem) -> Row:
    """Both log-sum-exps, both KLs, Σ p² and the entropy of p from one walk; zeros where a label is ignored."""
    teacher = Teacher(of)
    found, kept = teacher.sums, of.kept
    log_p, log_q = (x[kept] for x in teacher.logs)
    assert found.own.entropy is not None
    assert found.log_squares is not None
    assert found.own.target is not None
    errors = {
        "lse": largest(found.own.lse[kept], of.z[kept].logsumexp(1)),
        "teacher's lse": largest(found.other.lse[kept], teacher.u[kept].logsumexp(1)),
        "target": largest(found.own.target[kept], of.z.gather(1, of.own)[:, 0][kept]),
        "forward KL": largest(found.forward_kl[kept], (log_q.exp() * (log_q - log_p)).sum(1)),
        "reverse KL": largest(found.reverse_kl[kept], (log_p.exp() * (log_p - log_q)).sum(1)),
        "entropy": largest(found.own.entropy[kept], -(log_p.exp() * log_p).sum(1)),
        "squares": largest(found.log_squares[kept], (2.0 * log_p).logsumexp(1)),
        "ignored rows": largest(found.forward_kl[~kept], torch.zeros_like(found.forward_kl[~kept])),
    }
    return judged(errors, NATS)


def second_walk(of: Problem) -> Row:
    """KLs to the mixture, total variation and Σ p^α·q^{1−α}."""
    teacher = Teacher(of)
    found, kept = teacher.values, of.kept
    log_p, log_q = (x[kept] for x in teacher.logs)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((1.0 - BETA) * p + BETA * q).log()
    want = {
        "other_to_mixture": (q * (log_q - log_m)).sum(1),
        "own_to_mixture": (p * (log_p - log_m)).sum(1),
        "total_variation": 0.5 * (p - q).abs().sum(1),
        "power": (ALPHA * log_p + (1.0 - ALPHA) * log_q).exp().sum(1),
    }
    return judged({name: largest(getattr(found, name)[kept], x) for name, x in want.items()}, NATS)


def gradients_of_a_block(of: Problem) -> Row:
    """c·(p − q) and c·p·(log p/q − KL), of forward and reverse KL, and zeros in the rest of the last tiles."""
    teacher = Teacher(of)
    n, _, v = of.shape
    config = joint_tiles(
        "joint_dlogits", (of.hidden, teacher.hidden), (of.weight, teacher.head.weight), heavy=False, bias=False
    )
    c = of.memory.copied(of.coefficients.masked_fill(~of.kept, 0.0))
    rows, columns = (triton.cdiv(x, y) * y for x, y in ((n, config.block_m), (v, config.block_n)))
    log_p, log_q = teacher.logs
    p, gap = log_p.exp(), log_p - log_q
    reverse = (p * gap).sum(1, keepdim=True)
    wants = {"forward_kl": p - log_q.exp(), "reverse_kl": p * (gap - reverse)}
    errors: dict[str, float] = {}
    limits: dict[str, float] = {}
    for name, want in wants.items():
        factors = factors_of({name: c}, teacher.sums, JointValues())
        out = of.hidden.new_empty((rows, columns))
        sums = joint_dlogits(
            *teacher.inputs,
            of.labels,
            teacher.sums,
            of.memory.copied(factors.stacked()),
            factors.flags,
            out,
            config,
            beta=None,
            alpha=None,
            first_column=0,
            ignore_index=-100,
            want_bias=True,
        )
        assert sums is not None
        want = c.double()[:, None] * want
        rest = torch.cat([out[n:].flatten(), out[:, v:].flatten()])
        errors |= {
            f"dlogits, {name}": relative(out[:n, :v], want),
            f"column sums, {name}": relative(sums, want.sum(0)),
            f"past the end, {name}": largest(rest, torch.zeros_like(rest)),
        }
        limits |= dict.fromkeys((f"dlogits, {name}", f"column sums, {name}"), of.rounding)
        limits[f"past the end, {name}"] = 0.0
    return judged(errors, limits)


JOINT: dict[str, Callable[[Problem], Row]] = {
    "joint_stats": first_walk,
    "joint_values": second_walk,
    "joint_dlogits": gradients_of_a_block,
}
