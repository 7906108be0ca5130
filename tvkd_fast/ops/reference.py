"""The float64 twins: what each op means, with whole logits and nothing clever. Tests hold the ops to these.

Letters: N tokens, M states, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def sparse_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    eps: float,
    u: Tensor | None = None,
    always: Tensor | None = None,
    row_cap: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """`linear_logps`, whose gradient by a keeps p ≥ ε·u and the label, and spreads the rest over the other columns.

    g_j = J_j(δ_jy − p_j) on M = {p ≥ ε·u} ∪ {y} with p raised to ε where it is less, else −T/(V − |M|), such that
    Σ_j g_j is the exact gradient's; columns whose bias is −inf are left out. u [N, V] is 1 where None. Columns that are
    `always` (V,) in M have the exact gradient.
    So have rows with more than `row_cap` selected entries beside these and the label.
    """
    kept, v = labels != ignore_index, weight.shape[0]
    a = logit_scale * torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    )
    z = a if softcap is None else softcap * torch.tanh(a / softcap)
    p = z.detach().softmax(-1)
    chain = torch.ones_like(p) if softcap is None else 1.0 - (z.detach() / softcap) ** 2
    label = torch.nn.functional.one_hot(labels.where(kept, 0), v).bool()
    live = torch.ones(v, dtype=torch.bool) if bias is None else ~bias.isneginf()
    exact = chain * (label.double() - p)
    taken = label if always is None else label | always
    selected = (p >= eps * (1.0 if u is None else u)) & ~taken
    on = torch.where(selected, -chain * p.clamp_min(eps if u is not None else 0.0), exact * taken)
    others = ~(selected | taken) & live
    even = (exact.sum(1) - on.sum(1)) / others.sum(1).clamp_min(1)
    sparse = on + even[:, None] * others
    if row_cap is not None:
        sparse = torch.where((selected.sum(1) > row_cap)[:, None], exact, sparse)
    logps = torch.where(kept, z.detach().log_softmax(-1).gather(1, labels.where(kept, 0)[:, None])[:, 0], 0.0)
    # Σ_j g_j·a_j has g for its gradient; what it is does not show.
    surrogate = (sparse * a.nan_to_num(neginf=0.0)).sum(1) * kept
    return logps + surrogate - surrogate.detach()


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


def linear_joint(
    z: Tensor,
    u: Tensor,
    labels: Tensor | None = None,
    *,
    outputs: Sequence[str],
    beta: float = 0.5,
    alpha: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """The joint outputs of whole logits z and u [N, V], by name: (N,) float64 each, 0 where a label is ignored."""
    log_p, log_q = (z / temperature).log_softmax(-1), (u / temperature).log_softmax(-1)
    log_m = (
        torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
        if 0 < beta < 1
        else (log_q if beta else log_p)
    )
    p, q = log_p.exp(), log_q.exp()
    kept = None if labels is None else labels != ignore_index
    found: dict[str, Tensor] = {
        "lse": (z / temperature).logsumexp(-1),
        "teacher_lse": (u / temperature).logsumexp(-1),
        "entropy": -_mean(p, log_p),
        "log_sum_p2": (2 * log_p).logsumexp(-1),
        "forward_kl": _mean(q, log_q - log_p),
        "reverse_kl": _mean(p, log_p - log_q),
        "skew_forward_kl": _mean(q, log_q - log_m),
        "skew_reverse_kl": _mean(p, log_p - log_m),
        "tvd": 0.5 * (p - q).abs().sum(-1),
        "alpha": (p**alpha * q ** (1 - alpha)).sum(-1),
    }
    # GKD's special cases: the formula itself is 0 at both ends.
    ends = {0.0: found["forward_kl"], 1.0: found["reverse_kl"]}
    found["jsd"] = ends.get(beta, beta * found["skew_forward_kl"] + (1 - beta) * found["skew_reverse_kl"])
    if labels is not None and kept is not None:
        found["logps"] = log_p.gather(1, labels.where(kept, 0)[:, None])[:, 0]
        found = {name: torch.where(kept, x, 0.0) for name, x in found.items()}
    return {name: found[name] for name in outputs}


def _mean(p: Tensor, x: Tensor) -> Tensor:
    """Σ p·x over the vocabulary, where an entry of probability 0 counts as 0."""
    return (p * x.masked_fill(p == 0, 0.0)).sum(-1)


def sparse_joint(
    hidden: Tensor,
    weight: Tensor,
    u: Tensor,
    labels: Tensor | None = None,
    *,
    outputs: Sequence[str],
    eps: float,
    teacher_eps: float | None = None,
    row_cap: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    **options: float,
) -> dict[str, Tensor]:
    """`linear_joint` of hidden, weight and a teacher's logits u [N, V], whose gradient by the products a is sparse.

    With g = doutput/da it is g_j on M = {p ≥ ε} ∪ {q ≥ ε} ∪ {y}, and elsewhere Σ_{j∉M} g_j/(V − |M|); columns whose
    bias is −inf are in neither. ε of q alone is `teacher_eps`. Rows with more than `row_cap` entries beside the label
    have the exact gradient.
    """
    a = logit_scale * torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    )
    leaf = a.detach().requires_grad_()
    z = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    found = linear_joint(
        z,
        u,
        labels,
        outputs=outputs,
        temperature=temperature,
        ignore_index=ignore_index,
        **options,
    )
    v = weight.shape[0]
    p, q = (z.detach() / temperature).softmax(-1), (u.detach() / temperature).softmax(-1)
    live = torch.ones(v, dtype=torch.bool) if bias is None else ~bias.isneginf()
    label = torch.zeros_like(p, dtype=torch.bool)
    if labels is not None:
        label = torch.nn.functional.one_hot(labels.where(labels != ignore_index, 0), v).bool()
    selected = ((p >= eps) | (q >= (eps if teacher_eps is None else teacher_eps))) & live & ~label
    others = ~(selected | label) & live
    for name, value in found.items():
        exact = torch.zeros_like(a)
        if value.requires_grad:
            exact = torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0].nan_to_num(0.0)
        even = (exact * others).sum(1) / others.sum(1).clamp_min(1)
        sparse = exact * ~others + even[:, None] * others
        if row_cap is not None:
            sparse = torch.where((selected.sum(1) > row_cap)[:, None], exact, sparse)
        surrogate = (sparse * a.nan_to_num(neginf=0.0)).sum(1)
        found[name] = value.detach() + surrogate - surrogate.detach()
    return found
