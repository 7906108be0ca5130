"""The contenders of `bench.gpu`: ours, plain torch, Liger, Cut Cross-Entropy (CCE) and TRL.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.harness.inputs import Head, Inputs, Objective, Run, Values, preference, sequences, weighted
from tvkd_fast import linear_logps


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Eager a few rows at a time, logits recomputed: the truth from float32 inputs, the yardstick from bfloat16."""
    rows = zip(hidden.split(1024), labels.split(1024), strict=True)
    return torch.cat([checkpoint(eager, h, weight, y, use_reentrant=False) for h, y in rows])


@cache
def _compiled_eager() -> Head:
    return torch.compile(eager, dynamic=False)


def compiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _compiled_eager()(hidden, weight, labels)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, *, accumulate: torch.dtype | None) -> Tensor:
    """Of a loss per token Liger makes the logits anew in its backward: four products. For a frozen head 0.8.5 makes no
    dW, which leaves three."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=accumulate)(weight, hidden, labels)


def cce(hidden: Tensor, weight: Tensor, labels: Tensor, *, skip: str | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=skip)


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # No bias, temperature 1, TRL's own chunk of columns, no softcap, logit scale 1, nothing but log-probabilities.
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0]


def liger_dpo(inputs: Inputs) -> Values:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, (chosen, rejected, *_) = LigerFusedLinearDPOLoss()(
        inputs.weight,
        sequences(inputs.hidden),
        sequences(inputs.labels),
        ref_input=sequences(inputs.reference),
        ref_weight=inputs.weight.detach(),
    )
    return torch.cat([chosen, rejected]), loss


@dataclass(frozen=True)
class Contender:
    run: Run
    objective: Objective = weighted
    skips: bool = False
    """Leaves small gradients out by design."""
    frozen: bool = False
    """Its weight wants no gradient, and it is asked for none."""

    def given(self, inputs: Inputs) -> Inputs:
        return inputs.frozen_head() if self.frozen else inputs


def of(head: Head, objective: Objective = weighted, *, skips: bool = False, frozen: bool = False) -> Contender:
    return Contender(partial(objective, head), objective, skips, frozen)


def contenders(impl: Literal["auto", "torch", "triton"] = "triton") -> dict[str, Contender]:
    """By name, in the order of the table. CCE with a frozen head skips nothing."""
    ours = partial(linear_logps, impl=impl)
    return {
        "tvkd_fast": of(ours),
        "eager": of(eager),
        "torch.compile": of(compiled),
        "Liger": of(partial(liger, accumulate=None)),
        "Liger, float32 dW": of(partial(liger, accumulate=torch.float32)),
        "CCE": of(partial(cce, skip="high"), skips=True),
        "CCE, nothing skipped": of(partial(cce, skip=None)),
        "TRL": of(trl),
        "tvkd_fast, DPO": of(ours, preference),
        "Liger, DPO": Contender(liger_dpo, preference),
        "tvkd_fast, frozen head": of(ours, frozen=True),
        "eager, frozen head": of(eager, frozen=True),
        "torch.compile, frozen head": of(compiled, frozen=True),
        "Liger, frozen head": of(partial(liger, accumulate=None), frozen=True),
        "CCE, frozen head": of(partial(cce, skip=None), frozen=True),
    }
