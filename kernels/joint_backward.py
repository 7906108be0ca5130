"""The exact gradients of a mixture of outputs of two vocabulary heads: one recompute of both, whatever is mixed.

Every output's gradient by the logits is p ⊙ (g − E_p g) for some g, or p − q, or δ − p. Their weighted sum is one block
of dlogits a step, and two products of it; a row's constants become one number, the factor of p.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tvkd_fast.kernels.autotune import joint_tiles
from tvkd_fast.kernels.head_backward import BlockWalk
from tvkd_fast.kernels.joint_dlogits import Factors, joint_dlogits
from tvkd_fast.kernels.joint_stats import biased, heavy
from tvkd_fast.kernels.records import Head, HeadGradients, HeadSums, JointSums, JointValues
from tvkd_fast.kernels.sliced_head import LastColumns, bytes_per_column


@dataclass(frozen=True)
class JointWeights:
    """The upstream gradient of each output, (N,) each; None where an output takes no part.

    p is the softmax whose gradients are made, q the other, m = (1 − β')p + β'q.
    """

    logps: Tensor | None = None
    """log p at the label."""
    lse: Tensor | None = None
    """LSE(z)"""
    other_lse: Tensor | None = None
    """LSE(u)"""
    forward_kl: Tensor | None = None
    """KL(q‖p)"""
    reverse_kl: Tensor | None = None
    """KL(p‖q)"""
    entropy: Tensor | None = None
    """−Σ p log p"""
    log_squares: Tensor | None = None
    """log Σ p²"""
    other_to_mixture: Tensor | None = None
    """KL(q‖m)"""
    own_to_mixture: Tensor | None = None
    """KL(p‖m)"""
    total_variation: Tensor | None = None
    """½ Σ |p − q|"""
    power: Tensor | None = None
    """Σ p^α·q^{1−α}"""

    @classmethod
    def of_jsd(cls, upstream: Tensor, beta: float) -> JointWeights:
        """The weights of β'·KL(q‖m) + (1 − β')·KL(p‖m)."""
        return cls(other_to_mixture=upstream * beta, own_to_mixture=upstream * (1.0 - beta))

    def swapped(self) -> JointWeights:
        """The same with p and q in each other's place: for the other side's gradients. What p alone has is left out."""
        return JointWeights(
            lse=self.other_lse,
            other_lse=self.lse,
            forward_kl=self.reverse_kl,
            reverse_kl=self.forward_kl,
            other_to_mixture=self.own_to_mixture,
            own_to_mixture=self.other_to_mixture,
            total_variation=self.total_variation,
            power=self.power,
        )

    @property
    def given(self) -> dict[str, Tensor]:
        numbers = {x.name: getattr(self, x.name) for x in fields(self)}
        return {name: x.float() for name, x in numbers.items() if x is not None}

    def of_rows(self, labels: Tensor | None, ignore_index: int, vocab_size: int | None) -> dict[str, Tensor]:
        """What is given, (N,) each, 0 in ignored rows; with a vocabulary's size NaN where it lacks the label.

        A label that no row of weight holds has no logp, and must not get a gradient that looks like one.
        """
        given = self.given
        assert "logps" not in given or labels is not None
        if labels is None:
            return given
        ignored = labels == ignore_index
        given = {name: x.masked_fill(ignored, 0.0) for name, x in given.items()}
        if "logps" in given and vocab_size is not None:
            nowhere = ~ignored & ((labels < 0) | (labels >= vocab_size))
            given["logps"] = given["logps"].masked_fill(nowhere, torch.nan)
        return given


def joint_gradients(
    hidden: Tensor,
    head: Head,
    other_hidden: Tensor,
    other_head: Head,
    labels: Tensor | None,
    sums: JointSums,
    weights: JointWeights,
    values: JointValues | None = None,
    *,
    ignore_index: int = -100,
    elsewhere: bool = False,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    """Exact gradients of Σ_t Σ_k w_kt·output_kt by hidden and head, whose softmax is p; not by the other side.

    That side's come from a second call with the two in each other's place: `joint_gradients(other_hidden, other_head,
    hidden, head, None, sums.swapped(), weights.swapped(), values.swapped(), …)`.

    Args:
        hidden: [N, D] and head, other_hidden [N, D'] and other_head, labels (N,): as `joint_sums` took them, or as
            `sums_by_slices` did.
        sums: as `joint_sums` gave them, with entropy and log_squares where their weights are given.
        weights: upstream gradients.
        values: as `joint_values` gave them, where a weight of theirs is given: it holds β' and α too.
        elsewhere: a label that no row of weight holds may lie in another part of the vocabulary that `sums` are over;
            it makes its row NaN otherwise, where log-probabilities have a weight.

    dH and dW accumulate in float32 and are rounded once; bitwise repeatable. Memory as `head_gradients`.
    """
    walk = _JointWalk(
        hidden, head, other_hidden, other_head, labels, sums, weights, values, ignore_index=ignore_index,
        elsewhere=elsewhere,
    )  # fmt: skip
    return walk.gradients(want_hidden=want_hidden, want_weight=want_weight, want_bias=want_bias)


class _JointWalk(BlockWalk):
    """The walk of a mixture of outputs of two heads."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        other_hidden: Tensor,
        other_head: Head,
        labels: Tensor | None,
        sums: JointSums,
        weights: JointWeights,
        values: JointValues | None,
        *,
        ignore_index: int,
        elsewhere: bool,
    ) -> None:
        self.other_hidden, self.other_columns = other_hidden, LastColumns(other_head)
        self.labels, self.sums, self.ignore_index = labels, sums, ignore_index
        values = values or JointValues()
        self.beta, self.alpha_of_power = values.beta, values.alpha
        given = weights.of_rows(labels, ignore_index, None if elsewhere else head.vocab_size)
        factors = factors_of(given, sums, values)
        self.flags = factors.flags
        stacked = factors.stacked()
        more = self.flags.mixture or self.flags.variation or self.flags.power
        demand = {"heavy": heavy(head, other_head) or more, "bias": biased(head, other_head)}
        chosen = joint_tiles("joint_dlogits", (hidden, other_hidden), (head.weight, other_head.weight), **demand)
        super().__init__(hidden, head, chosen, largest_of(given, sums, values), alpha=head.logit_scale)
        self.bytes_per_column += bytes_per_column(other_head)
        self.factors = stacked if self.wide else stacked / self.scale

    def dlogits(self, rows: slice, columns: slice, buffer: Tensor, *, want_bias: bool = False) -> Tensor | None:
        own, other = self.sums.own, self.sums.other
        return joint_dlogits(
            self.hidden[rows],
            self.columns(columns),
            self.other_hidden[rows],
            self.other_columns(columns),
            None if self.labels is None else self.labels[rows],
            JointSums(
                HeadSums(own.maximum[rows], own.log_total[rows]),
                HeadSums(other.maximum[rows], other.log_total[rows]),
                self.sums.forward_kl[rows],
                self.sums.reverse_kl[rows],
            ),
            self.factors[:, rows],
            self.flags,
            buffer,
            self.tiles,
            beta=self.beta,
            alpha=self.alpha_of_power,
            first_column=columns.start,
            ignore_index=self.ignore_index,
            want_bias=want_bias,
        )


def factors_of(given: dict[str, Tensor], sums: JointSums, values: JointValues) -> Factors:
    """The weights of outputs, (N,) float32 by name, to the factors of p, log p, log q and so on in dlogits.

    p ⊙ (g − E_p g) is linear in g, so that all means E_p g of a row go into the factor of p. A weight of 0 takes an
    infinite value's part away.
    """

    def total(*parts: Tensor | None) -> Tensor:
        kept = [x for x in parts if x is not None]
        return sum(kept[1:], start=kept[0]) if kept else torch.zeros_like(sums.forward_kl)

    def optional(*parts: Tensor | None) -> Tensor | None:
        return total(*parts) if any(x is not None for x in parts) else None

    def times(name: str, value: Tensor | float | None, by: float = 1.0) -> Tensor | None:
        """w·value·by, 0 where w is 0 whatever the value is; None without a weight."""
        if name not in given:
            return None
        assert value is not None, f"the gradient of {name} wants a value that was not asked for"
        weight = given[name]
        return torch.where(weight == 0.0, weight, weight * value * by)

    inverse_squares = None if sums.log_squares is None else 2.0 * torch.exp(-sums.log_squares)
    own_squares = excess = None
    if values.overlap is not None:
        assert values.beta is not None
        # (1−β')·Σ p²/m and β'·Σ pq/m sum to Σ p = 1.
        own_squares = values.beta * values.overlap - 1.0
    if values.excess is not None:
        excess = values.excess
    alpha = values.alpha or 0.0
    rest = 0.0 if values.beta is None else 1.0 - values.beta
    to_own_mean = None
    if values.own_to_mixture is not None and own_squares is not None:
        to_own_mean = values.own_to_mixture + own_squares
    means = (
        times("reverse_kl", sums.reverse_kl, -1.0),
        times("entropy", sums.own.entropy, -1.0),
        times("log_squares", 2.0, -1.0),
        times("own_to_mixture", to_own_mean, -1.0),
        times("other_to_mixture", values.overlap, rest),
        times("total_variation", excess, -0.5),
        times("power", values.power, -alpha),
    )
    return Factors(
        own=total(given.get("lse"), times("logps", -1.0), given.get("forward_kl"), *means),
        other=total(times("forward_kl", -1.0)),
        log_own=optional(given.get("reverse_kl"), times("entropy", -1.0)),
        log_other=optional(times("reverse_kl", -1.0)),
        own_squared=optional(times("log_squares", inverse_squares)),
        own_to_mixture=given.get("own_to_mixture"),
        other_to_mixture=given.get("other_to_mixture"),
        variation=times("total_variation", 0.5),
        power=times("power", alpha),
        label=given.get("logps"),
    )


def largest_of(given: dict[str, Tensor], sums: JointSums, values: JointValues) -> Tensor:
    """(N,) powers of 2, no less than |g_j| of any entry of a row: what 16 bits of range are laid out for.

    |p − q| ≤ 1. Of p·(log p/q − KL) the part under p is at most 1/e + KL below 0, and at most 2·KL + 1/e above it.
    """
    bounds: dict[str, Tensor | float] = {
        "reverse_kl": 2.0 * sums.reverse_kl + 1.0,
        "log_squares": 2.0,
        "own_to_mixture": 3.0,
        "other_to_mixture": 2.0,
        "power": 2.0,
    }
    if sums.own.entropy is not None:
        bounds["entropy"] = sums.own.entropy + 1.0
    if values.beta is not None:
        bounds["own_to_mixture"] = 3.0 - math.log1p(-values.beta)
    zero = torch.zeros_like(sums.forward_kl)
    most = sum((torch.where(x == 0.0, x, x.abs() * bounds.get(name, 1.0)) for name, x in given.items()), start=zero)
    return torch.exp2(torch.log2(most).ceil())
