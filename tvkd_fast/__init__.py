"""Preference distillation (TVKD) with a vocabulary head that never holds a logit tensor."""

from tvkd_fast.fused import (
    DistillationOutput,
    FusedLinearTVKDLoss,
    fused_linear_distillation_loss,
    fused_linear_tvkd_loss,
)
from tvkd_fast.losses import TVKDOutput, dpo_loss, sft_loss, shaping_returns, tvkd_loss
from tvkd_fast.ops import (
    ExpectedRows,
    Head,
    HeadGradient,
    HeadStats,
    linear_cached_forward_kl,
    linear_divergence,
    linear_expected_rows,
    linear_expected_score,
    linear_joint,
    linear_logps,
    linear_soft_values,
    linear_sparse_divergence,
)
from tvkd_fast.version import __version__

__all__ = [
    "DistillationOutput",
    "ExpectedRows",
    "FusedLinearTVKDLoss",
    "Head",
    "HeadGradient",
    "HeadStats",
    "TVKDOutput",
    "__version__",
    "dpo_loss",
    "fused_linear_distillation_loss",
    "fused_linear_tvkd_loss",
    "linear_cached_forward_kl",
    "linear_divergence",
    "linear_expected_rows",
    "linear_expected_score",
    "linear_joint",
    "linear_logps",
    "linear_soft_values",
    "linear_sparse_divergence",
    "sft_loss",
    "shaping_returns",
    "tvkd_loss",
]
