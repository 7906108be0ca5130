"""Heads of a policy that hold all their logits at once: what the fused one is measured against."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tvkd_fast.models import FusedLMHead


class EagerHead(FusedLMHead):
    """Log-probabilities by log-softmax of logits, as a trainer without a fused head has them."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None, **options: Any) -> Any:  # type: ignore[override]
        if labels is None:
            return super().forward(hidden, labels, **options)
        return self.logits(hidden).log_softmax(1).gather(1, labels[:, None])[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


class RoundedHead(EagerHead):
    """Logits rounded to bfloat16, as mixed precision leaves them; all else in float32."""

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        # A gradient goes through the rounding as if it were not there.
        return logits + (logits.bfloat16().float() - logits).detach()
