"""The teacher's part: shaping returns, and the figures that show when they drown the preference.

Letters: M states, S responses, P pairs; response i's states are `cu_states[i]:cu_states[i+1]`, s_0 first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tvkd_fast.losses.segments import check_boundaries, segment_sums

Terminal = Literal["last_content", "eos", "zero"]
TERMINALS = ("last_content", "eos", "zero")


def shaping_returns(
    values: Tensor,
    cu_states: Tensor,
    *,
    gamma: float = 1.0,
    terminal: Terminal = "last_content",
    ended: Tensor | None = None,
) -> Tensor:
    """Ψ(y) = Σ_{t=0}^{T−1} (γ V(s_{t+1}) − V(s_t)): potential-based shaping (Ng et al., 1999) summed over a response.

    At γ=1 it telescopes to V(last kept state) − V(s_0). It does not depend on the policy.

    Args:
        values: (M,) soft values of all responses' states, packed, s_0 first: T+1 states for T tokens where the teacher
            shares the tokenizer, any number ≥ 2 otherwise.
        cu_states: (S+1,) int boundaries of the responses' states.
        gamma: γ in [0, 1], discount.
        terminal: which state ends the sum. "last_content": the one that predicts the end-of-sequence token, so the step
            to the end adds nothing; "eos": the state after that token; "zero": V(s_T) = 0, under which shaping is
            policy-invariant in the strict sense and γ=1 is DPO itself.
        ended: (S,) bool, whether each response ends with an end-of-sequence token; all do where None. One that was cut
            off has no end: all its states are kept, and "zero" zeroes the last.

    Returns:
        (S,) in values' dtype, summed in float64, since differences of near-equal values are what is left.

    Raises:
        ValueError: γ outside [0, 1], an unknown terminal, boundaries that do not fit, a response of under 2 states
            (boundaries and states are looked at on a CPU only, and not under `torch.compile`, where there is no number
            to look at yet).

    Examples:
        Two responses, of 2 tokens and of 1; the step to the end-of-sequence token adds nothing.

        >>> import torch
        >>> values, cu_states = torch.tensor([1.0, 3.0, 9.0, 1.0, 2.0]), torch.tensor([0, 3, 5])
        >>> shaping_returns(values, cu_states)
        tensor([2., 0.])
        >>> shaping_returns(values, cu_states, gamma=0.5, terminal="eos")
        tensor([2., 0.])
        >>> shaping_returns(values, cu_states, terminal="zero")
        tensor([-1., -1.])
    """
    steps = shaping_steps(values, cu_states, gamma=gamma, terminal=terminal, ended=ended)
    return segment_sums(steps, cu_states).to(values.dtype)


def shaping_steps(
    values: Tensor,
    cu_states: Tensor,
    *,
    gamma: float = 1.0,
    terminal: Terminal = "last_content",
    ended: Tensor | None = None,
) -> Tensor:
    """γ V(s_{t+1}) − V(s_t) of every state, what `shaping_returns` sums, with its arguments and errors.

    Returns:
        (M,) float64; 0 at a response's last state, which no step leaves, and at the step that `terminal` leaves out.
    """
    check_shaping(values, cu_states, gamma, terminal, ended)
    lasts = cu_states[1:].long() - 1
    v = potential(values.double(), cu_states, terminal)
    # steps[i] leads from state i to i+1; the one that leads out of a response's last state belongs to nobody.
    steps = (gamma * v.roll(-1) - v).index_fill(0, lasts, 0.0)
    if terminal == "last_content":
        # Of a response that was cut off nothing more is dropped; naming its last state again keeps the shape static.
        to_the_end = lasts - 1 if ended is None else torch.where(ended.to(lasts.device), lasts - 1, lasts)
        steps = steps.index_fill(0, to_the_end, 0.0)
    return steps


def potential(values: Tensor, cu_states: Tensor, terminal: Terminal) -> Tensor:
    """(M,) values as a sum under `terminal` takes them: "zero" has 0 at a response's last state."""
    return values.index_fill(0, cu_states[1:].long() - 1, 0.0) if terminal == "zero" else values


ROUNDING = 1e-5
"""Nats of a margin that are no more than float32's rounding of log-probabilities."""


@dataclass(frozen=True)
class ShapingReport:
    """The effect of shaping on a set of pairs (at γ<1 from logits it is nearly a length penalty: docs/method.md)."""

    std_ratio: float
    """std(αΔΨ)/std(βΔρ): above 1 the teacher's offset outweighs the policy's own margin."""
    length_correlation: float
    """Pearson correlation of αΔΨ with the difference in response length."""
    flipped: float
    """Share of pairs whose margin has another sign once shaped."""

    @property
    def warning(self) -> str | None:
        if not self.std_ratio > 1:
            return None
        return (
            f"shaping outweighs the policy's margins: std(αΔΨ)/std(βΔρ) = {self.std_ratio:.2f} (correlation with "
            f"length {self.length_correlation:+.2f}, {self.flipped:.0%} of signs flipped). Lower --loss.alpha, raise "
            "--loss.gamma towards 1, or take --loss.value_from logprobs with kappa ≠ 1."
        )


def shaping_report(margins: Tensor, shaping_margins: Tensor, length_differences: Tensor) -> ShapingReport:
    """The three figures, from (P,) βΔρ, (P,) αΔΨ and (P,) chosen length − rejected length.

    Margins under 1e-5 nats count as 0.
    """
    rho, psi, length = (x.double() for x in (margins, shaping_margins, length_differences))
    # Before the first update the policy is its reference, and what its margins are is how two sums were rounded.
    rho = rho.masked_fill(rho.abs() < ROUNDING, 0.0)
    return ShapingReport(
        std_ratio=_ratio(psi.std(correction=0), rho.std(correction=0)),
        length_correlation=_correlation(psi, length),
        flipped=float((rho * (rho - psi) < 0).double().mean()),
    )


def _ratio(a: Tensor, b: Tensor) -> float:
    if a == 0:
        return 0.0
    return float(a / b) if b > 0 else float("inf")


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return float(a @ b / scale) if scale > 0 else 0.0


def check_discount(gamma: float) -> None:
    """γ in [0, 1], or a ValueError."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1] (a discount; 1 is the default), got {gamma}")


def check_shaping(values: Tensor, cu_states: Tensor, gamma: float, terminal: str, ended: Tensor | None) -> None:
    """Raise ValueError for inputs that `shaping_returns` refuses."""
    check_discount(gamma)
    if terminal not in TERMINALS:
        raise ValueError(f"terminal must be one of {', '.join(TERMINALS)}, got {terminal!r}")
    if values.dim() != 1:
        raise ValueError(f"values must be (M,), packed, got {tuple(values.shape)}")
    check_boundaries("cu_states", cu_states, values.shape[0])
    if ended is not None and (ended.dtype != torch.bool or ended.shape != cu_states[1:].shape):
        raise ValueError(
            f"ended must be ({cu_states.numel() - 1},) bool, one per response, got {tuple(ended.shape)} {ended.dtype}"
        )
    if cu_states.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (cu_states.diff() < 2).any():
        row = int((cu_states.diff() < 2).nonzero()[0, 0])
        raise ValueError(
            f"response {row} has {int(cu_states.diff()[row])} states; s_0 and at least one more are needed"
        )
