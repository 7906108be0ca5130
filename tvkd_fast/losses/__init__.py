"""Pure functions of per-token or per-sequence numbers: they know preferences and nothing of vocabulary."""

from tvkd_fast.losses.likelihood import sft_loss
from tvkd_fast.losses.margins import (
    distillation_errors,
    labelled_losses,
    log_odds,
    on_policy_weights,
    robust_losses,
    sigmoid_losses,
)
from tvkd_fast.losses.preference import TVKDOutput, check_preference_settings, dpo_loss, tvkd_loss
from tvkd_fast.losses.segments import running_sums, segment_sums
from tvkd_fast.losses.shaping import (
    ShapingReport,
    Terminal,
    check_discount,
    shaping_report,
    shaping_returns,
    shaping_steps,
)

__all__ = [
    "ShapingReport",
    "TVKDOutput",
    "Terminal",
    "check_discount",
    "check_preference_settings",
    "distillation_errors",
    "dpo_loss",
    "labelled_losses",
    "log_odds",
    "on_policy_weights",
    "robust_losses",
    "running_sums",
    "segment_sums",
    "sft_loss",
    "shaping_report",
    "shaping_returns",
    "shaping_steps",
    "sigmoid_losses",
    "tvkd_loss",
]
