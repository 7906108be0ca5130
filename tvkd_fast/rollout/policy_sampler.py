"""A policy in training as a sampler."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from tvkd_fast.distributed import full_tensor
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.rollout.model_sampler import TOKENS_AT_ONCE, ModelSampler
from tvkd_fast.rollout.samples import Finished, Sample, SamplePrompt
from tvkd_fast.rollout.sampling import Sampling


class PolicySampler:
    """Samples from the weights that a policy has when it is asked, in the precision of its training.

    Args:
        policy: the policy in training; its weights may be in shards.
        stops, max_length, tokens_at_once: as in `ModelSampler`.
        whole: a model of the same kind that this process holds whole, where the policy's weights are in shards. They
            are gathered into it once for every call, which is a collective then.
    """

    def __init__(
        self,
        policy: PolicyWithHead,
        stops: Collection[int],
        *,
        max_length: int | None = None,
        tokens_at_once: int = TOKENS_AT_ONCE,
        whole: PolicyWithHead | None = None,
    ) -> None:
        self.policy, self.asked = policy, policy if whole is None else whole
        self.sampler = ModelSampler(self.asked.model, stops, max_length=max_length, tokens_at_once=tokens_at_once)

    def sample(
        self,
        prompts: Sequence[SamplePrompt],
        sampling: Sampling,
        *,
        seed: int,
        step: int = 0,
        finished: Finished = lambda samples: None,
    ) -> list[list[Sample]]:
        """As `ModelSampler.sample`."""
        if self.asked is not self.policy:
            self._gather()
        with self.asked.precision():
            return self.sampler.sample(prompts, sampling, seed=seed, step=step, finished=finished)

    @torch.no_grad()
    def _gather(self) -> None:
        for own, whole in zip(self.policy.parameters(), self.asked.parameters(), strict=True):
            whole.copy_(full_tensor(own.detach()))
