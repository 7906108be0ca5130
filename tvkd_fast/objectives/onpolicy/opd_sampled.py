"""On-policy distillation with a scaled reward at the sampled tokens alone: the policy gradient of `opd`.

With μ the sampler's law, ρ_t = π(y_t)/μ(y_t) and A_t = −[log π − log r − λ(log q − log r)] at y_t without a gradient,

    E_{y_t~μ}[−∇(ρ_t A_t)] = ∇KL(p ‖ r^{1−λ}q^λ/Z)     per state,

so that it is unbiased for the full vocabulary's gradient until ρ is clipped or capped. The released code keeps three
policies apart, the learner's, the one that began the step, and the sampler's. Here the first two are π, and ρ is
clipped as PPO does and capped as importance weights are there.

Letters: P pairs, N response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.objectives.contract import Factors, Need, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import Joint
from tvkd_fast.objectives.onpolicy.opd import OPD
from tvkd_fast.objectives.registry import objective
from tvkd_fast.ops import Head, linear_logps
from tvkd_fast.ranges import POSITIVE, Range, number
from tvkd_fast.scoring.layout import Scores


@objective("opd_sampled", source="arXiv 2602.12125")
@dataclass(kw_only=True)
class SampledOPD(OPD):
    """−Σ_t min(ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t), A_t = −[log π − log r − λ(log q − log r)] at the sampled token,
    divided by tokens and not by pairs.

    ρ = π/μ, μ the sampler's law; A carries no gradient.
    """

    clip_ratio: float = number(0.2, POSITIVE)
    """ε > 0: PPO's clip of ρ."""
    importance_cap: float = number(5.0, Range(1))
    """The most that ρ counts."""

    linear = False
    per_pair = False

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {Need.SAMPLER_LOGPS}

    @property
    def joint(self) -> tuple[Joint, ...]:
        return ()

    def numbers(
        self, policy: PolicyWithHead, scores: Scores, batch: PairBatch, factors: Factors | None = None
    ) -> PolicyNumbers:
        logps = policy(batch)
        return PolicyNumbers(segment_sums(logps, batch.cu_seqlens), batch.lengths, token_logps=logps)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        logps, sampler = policy.token_logps, batch.sampler_logps
        assert logps is not None
        assert sampler is not None
        advantages = self.target_logps(scores, batch).to(logps.dtype) - logps.detach()
        losses = segment_sums(self.surrogate(logps, sampler.to(logps.dtype), advantages), batch.cu_seqlens)
        return ObjectiveOutput(losses[: batch.num_pairs])

    @torch.no_grad()
    def target_logps(self, scores: Scores, batch: PairBatch) -> Tensor:
        """(N,) (1−λ) log r + λ log q at the labels, nats."""
        found = torch.zeros((), device=batch.labels.device)
        for factor, whose in self.target:
            hidden, head = getattr(scores, f"{whose}_hidden"), getattr(scores, f"{whose}_head")
            assert isinstance(head, Head)
            found = found + factor * linear_logps(hidden, head, batch.labels)
        return found

    def surrogate(self, logps: Tensor, sampler: Tensor, advantages: Tensor) -> Tensor:
        """(N,) per-token losses of log π, log μ and A (N,); differentiable by log π."""
        log_ratio = logps - sampler
        over = (log_ratio - math.log(self.importance_cap)).clamp(min=0).detach()
        ratio = (log_ratio - over).exp()
        clipped = ratio.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
        return -torch.minimum(ratio * advantages, clipped * advantages)
