"""Sampling from a policy, and what is kept of a sample."""

from tvkd_fast.rollout.model_sampler import ModelSampler
from tvkd_fast.rollout.policy_sampler import PolicySampler
from tvkd_fast.rollout.rollout_config import RolloutConfig
from tvkd_fast.rollout.rollouts import Rollouts
from tvkd_fast.rollout.samples import Sample, SampleCounts, SamplePrompt, Sampler
from tvkd_fast.rollout.sampling import Sampling

__all__ = [
    "ModelSampler",
    "PolicySampler",
    "RolloutConfig",
    "Rollouts",
    "Sample",
    "SampleCounts",
    "SamplePrompt",
    "Sampler",
    "Sampling",
]
