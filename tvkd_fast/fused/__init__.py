"""The whole loss in one call, for another trainer's training step: hidden states in, the loss out, logits never.

The head's statistics, the loss and its derivative by each log-probability are made in the forward; the backward is the
head's exact gradient with one coefficient per token. Whatever depends on the contents of a tensor lies in the bodies of
registered ops, so that `torch.compile` sees static shapes.
"""

from tvkd_fast.fused.distillation import DistillationOutput, fused_linear_distillation_loss
from tvkd_fast.fused.loss import fused_linear_tvkd_loss
from tvkd_fast.fused.module import FusedLinearTVKDLoss

__all__ = [
    "DistillationOutput",
    "FusedLinearTVKDLoss",
    "fused_linear_distillation_loss",
    "fused_linear_tvkd_loss",
]
