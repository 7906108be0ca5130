"""A head's inputs and tasks, and their runs forward, or forward and backward.

Letters: N tokens, D hidden, V vocabulary, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tvkd_fast import dpo_loss, fused_linear_tvkd_loss
from tvkd_fast.ops import HeadGradient

PAIRS = 4
BETA = 0.1
"""β of the DPO loss that a contender may go backward from."""
Shape = tuple[int, int, int]
Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden [N, D], weight [V, D] and labels (N,) to log-probabilities (N,), or to values (N,)."""


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    coefficients: Tensor
    reference: Tensor | None = None
    """[N, D]: the reference policy's states, where DPO has one; its weight is the policy's, detached."""
    cu_seqlens: Tensor | None = None
    """(2P+1,) boundaries of the pairs' responses, chosen first."""

    def detached(self) -> Inputs:
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach())

    def frozen_head(self) -> Inputs:
        return replace(self, weight=self.weight.detach())

    def frozen_backbone(self) -> Inputs:
        return replace(self, hidden=self.hidden.detach())

    def double(self) -> Inputs:
        hidden, weight = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        reference = None if self.reference is None else self.reference.double()
        return replace(self, hidden=hidden, weight=weight, coefficients=self.coefficients.double(), reference=reference)


Values = tuple[Tensor, Tensor]
"""The values that are compared, and the scalar to go backward from."""
Run = Callable[[Inputs], Values]
Task = Literal["logps", "values", "preference", "pairs"]
"""The tasks of a head: labels' log-probabilities that are weighted and summed, values alone, or DPO's loss, of four
pairs of equal length or of the pairs that the tokens are of."""


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    n, d, v = shape
    torch.manual_seed(0)
    normal = partial(torch.randn, dtype=dtype, device=device)
    hidden, weight = normal(n, d), normal(v, d) / d**0.5
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(v, (n,), device=device),
        torch.randn(n, device=device),
        hidden.detach() + 0.1 * normal(n, d),
    )


def weighted(head: Head, inputs: Inputs) -> Values:
    """Under given coefficients, as a preference loss sends them back."""
    values = head(inputs.hidden, inputs.weight, inputs.labels)
    return values, (values * inputs.coefficients).sum()


def preference(head: Head, inputs: Inputs) -> Values:
    """DPO's loss of four pairs, chosen sequences first; compared by the sequences' log-probabilities."""
    policy = sequences(head(inputs.hidden, inputs.weight, inputs.labels)).sum(1)
    reference = torch.zeros_like(policy)
    if inputs.reference is not None:
        with torch.no_grad():
            reference = sequences(head(inputs.reference, inputs.weight.detach(), inputs.labels)).sum(1)
    return policy, dpo_loss(policy, reference, beta=BETA).loss


def fused_pairs(inputs: Inputs, gradient: HeadGradient) -> Values:
    """The fused loss of the tokens' own pairs, DPO without a reference; compared by its gradients."""
    assert inputs.cu_seqlens is not None
    out = fused_linear_tvkd_loss(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        inputs.cu_seqlens,
        ref_logps=inputs.hidden.new_zeros(len(inputs.cu_seqlens) - 1),
        beta=BETA,
        alpha=0.0,
        gradient=gradient,
    )
    return out.chosen_rewards, out.loss


def sequences(tokens: Tensor) -> Tensor:
    """[N, …] as [2P, N/2P, …]."""
    if len(tokens) % (2 * PAIRS):
        raise ValueError(f"{len(tokens)} tokens are not {PAIRS} pairs of equal length")
    return tokens.unflatten(0, (2 * PAIRS, -1))


def both(run: Run, inputs: Inputs) -> tuple[Tensor, ...]:
    """Values and the gradients by hidden and, where the head is not frozen, by weight."""
    values, loss = run(inputs)
    wanted = [x for x in (inputs.hidden, inputs.weight) if x.requires_grad]
    return values.detach(), *torch.autograd.grad(loss, wanted)


def forward(run: Run, detached: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (run(detached)[0],)
