"""Self-distillation: inner layers learn what the last one says, through the same head (arXiv 2103.07350).

Letters: P pairs, 2P responses; N response tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import FusedLMHead, PolicyWithHead
from tvkd_fast.models.parts.layer_states import check_layers
from tvkd_fast.objectives.contract import Need
from tvkd_fast.objectives.registry import objective
from tvkd_fast.objectives.states.state_distance import StateDistance
from tvkd_fast.ops import linear_divergence
from tvkd_fast.ranges import NOT_NEGATIVE, POSITIVE, number
from tvkd_fast.scoring.layout import Scores


@objective("self_distillation", source="arXiv 2103.07350")
@dataclass(kw_only=True)
class SelfDistillation(StateDistance):
    """−w log π(y_w)/|y_w| + a(D_w + D_l)/2, D = mean over layers and tokens of KL(sg(p)‖p_k).

    p is the policy's own distribution, and p_k the head's of layer k's states, the final norm applied. Rewards that are
    shown are mean log-probabilities.
    """

    distance_weight: float = number(0.1, NOT_NEGATIVE)
    """a ≥ 0: weight of the divergence, the mean of both responses'."""
    layers: list[int] | None = None
    """Which layers learn: 1 is the first block. The middle one where not given."""
    kind: Literal["forward_kl", "reverse_kl", "jsd", "tvd"] = "forward_kl"
    """The divergence: KL(p‖p_k), KL(p_k‖p), their JSD, or the total variation."""
    temperature: float = number(1.0, POSITIVE)
    """τ > 0, by which all logits are divided."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            return
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers must name inner layers, each once, got {self.layers}: set --loss.layers")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REJECTED})

    @property
    def more_products(self) -> int:  # type: ignore[override]
        # Logits of both layers twice, dH and dW.
        return 6 * (1 if self.layers is None else len(self.layers))

    @property
    def whole_head(self) -> bool:
        return True

    def check_policy(self, policy: PolicyWithHead) -> None:
        try:
            check_layers(policy.model, self.layers_of(policy))
        except ValueError as error:
            raise ValueError(f"{error}; set --loss.layers") from error

    def layers_of(self, policy: PolicyWithHead) -> tuple[int, ...]:
        if self.layers is not None:
            return tuple(self.layers)
        return (policy.model.config.get_text_config().num_hidden_layers // 2,)

    def distances(
        self, policy: PolicyWithHead, states: tuple[Tensor, ...], head: FusedLMHead, scores: Scores, batch: PairBatch
    ) -> Tensor:
        last, *inner = states
        whole = head.whole
        deep = replace(whole, weight=whole.weight.detach(), bias=None if whole.bias is None else whole.bias.detach())
        of_tokens = [
            linear_divergence(hidden, whole, last.detach(), deep, kind=self.kind, temperature=self.temperature)
            for hidden in inner
        ]
        summed = sum(of_tokens[1:], start=of_tokens[0]) / len(of_tokens)
        return segment_sums(summed, batch.cu_seqlens) / batch.lengths
