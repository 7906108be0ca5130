"""The fused loss as a module."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from tvkd_fast.fused.arguments import check_settings
from tvkd_fast.fused.loss import EXACT, fused_linear_tvkd_loss
from tvkd_fast.losses import TVKDOutput
from tvkd_fast.losses.shaping import Terminal
from tvkd_fast.ops import Head, HeadGradient, HeadStats
from tvkd_fast.ops.dispatch import Impl
from tvkd_fast.ops.values import ValueFrom


class FusedLinearTVKDLoss(nn.Module):
    """`fused_linear_tvkd_loss` with its settings in the constructor and its tensors in `forward`. No parameters.

    Examples:
        >>> import torch
        >>> loss = FusedLinearTVKDLoss(beta=0.1, alpha=0.0)  # DPO
        >>> hidden, weight, labels = torch.randn(5, 8), torch.randn(20, 8), torch.randint(20, (5,))
        >>> out = loss(hidden, weight, labels, torch.tensor([0, 3, 5]), ref_hidden=hidden, ref_weight=weight)
        >>> out.loss
        tensor(0.6931)
    """

    def __init__(
        self,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        teacher_softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        ref_softcap: float | Literal["policy"] | None = "policy",
        ref_logit_scale: float | Literal["policy"] = "policy",
        beta: float = 0.1,
        alpha: float = 1.0,
        gamma: float = 1.0,
        terminal: Terminal = "last_content",
        kappa: float = 1.0,
        value_scale: float | None = None,
        value_from: ValueFrom = "logits",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        gradient: HeadGradient = EXACT,
        stats: HeadStats | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_settings(beta, alpha, gamma, terminal, kappa, value_from, label_smoothing, impl)
        self.settings: dict[str, Any] = {
            "softcap": softcap,
            "logit_scale": logit_scale,
            "teacher_softcap": teacher_softcap,
            "teacher_logit_scale": teacher_logit_scale,
            "ref_softcap": ref_softcap,
            "ref_logit_scale": ref_logit_scale,
            "beta": beta,
            "alpha": alpha,
            "gamma": gamma,
            "terminal": terminal,
            "kappa": kappa,
            "value_scale": value_scale,
            "value_from": value_from,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "gradient": gradient,
            "stats": stats,
            "impl": impl,
        }

    def forward(
        self,
        policy_hidden: Tensor,
        policy_weight: Tensor | Head,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | Head | None = None,
        cu_states: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | Head | None = None,
        psi: Tensor | None = None,
        ended: Tensor | None = None,
        policy_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> TVKDOutput:
        return fused_linear_tvkd_loss(
            policy_hidden,
            policy_weight,
            labels,
            cu_seqlens,
            teacher_hidden,
            teacher_weight,
            cu_states,
            ref_logps=ref_logps,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            psi=psi,
            ended=ended,
            policy_bias=policy_bias,
            teacher_bias=teacher_bias,
            ref_bias=ref_bias,
            **self.settings,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
