"""The float64 twins: what each op means, with whole logits and nothing clever. Tests hold the ops to these.

Letters: N tokens, M states, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """z = softcap·tanh(a/softcap), a = logit_scale·(h·w + bias): [N, V] float64."""
    a = logit_scale * torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    )
    return a if softcap is None else softcap * torch.tanh(a / softcap)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """log softmax(z)[label], 0 where ignored: (N,) float64."""
    kept = labels != ignore_index
    logps = logits(hidden, weight, bias, softcap, logit_scale).log_softmax(-1)
    return torch.where(kept, logps.gather(1, labels.where(kept, 0)[:, None])[:, 0], 0.0)


def linear_soft_values(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    kappa: float = 1.0,
    value_scale: float = 1.0,
    value_from: str = "logits",
) -> Tensor:
    """b·LSE(κz)/κ, or b·LSE(κ log softmax z)/κ from "logprobs": (M,) float64."""
    z = logits(hidden, weight, bias, softcap, logit_scale)
    return value_scale / kappa * (kappa * (z.log_softmax(-1) if value_from == "logprobs" else z)).logsumexp(-1)


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """−Σ p log p with p = softmax(z) and 0·log 0 = 0: (M,) float64."""
    return torch.special.entr(logits(hidden, weight, bias, softcap, logit_scale).softmax(-1)).sum(-1)
