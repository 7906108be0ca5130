"""The heads of others, as they are called: plain torch, Liger, Cut Cross-Entropy (CCE) and TRL.

hidden [N, D], weight [V, D] and labels (N,) to log-probabilities (N,), unless a function says otherwise.
"""

from __future__ import annotations

import shutil
from functools import cache

import torch
from torch import Tensor

from bench.harness.inputs import BETA, Head, Inputs, Values, sequences


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def eager_logsumexp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(-1)


def eager_values(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """log-sum-exp (N,)."""
    return (hidden @ weight.T).logsumexp(1)


@cache
def _compiled(head: Head) -> Head:
    return torch.compile(head, dynamic=False)


def compiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _compiled(eager)(hidden, weight, labels)


def compiled_values(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """log-sum-exp (N,)."""
    return _compiled(eager_values)(hidden, weight, labels)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, *, accumulate: torch.dtype | None) -> Tensor:
    """Run Liger's loss per token, which recomputes the logits in its backward: four products. A frozen head has no
    dW, which leaves three."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=accumulate)(weight, hidden, labels)


def cce(hidden: Tensor, weight: Tensor, labels: Tensor, *, skip: str | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=skip)


def cce_compiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile")


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # No bias, temperature 1, TRL's own chunk of columns, no softcap, logit scale 1, nothing but log-probabilities.
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0]


def liger_dpo(inputs: Inputs) -> Values:
    """The whole loss of four pairs, with a reference where the inputs have one."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    given = {}
    if inputs.reference is not None:
        given = {"ref_input": sequences(inputs.reference), "ref_weight": inputs.weight.detach()}
    # On a CPU torch.compile takes a compiler of C++.
    compiles = inputs.hidden.is_cuda or shutil.which("g++") is not None
    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=bool(given), compiled=compiles)
    total, (chosen, rejected, *_) = loss(inputs.weight, sequences(inputs.hidden), sequences(inputs.labels), **given)
    return torch.cat([chosen, rejected]), total
