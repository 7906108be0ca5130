"""The method on one page: from a step's micro-batches of pairs to one update of the policy.

    ρ(y) = log π_θ(y) − log π_ref(y)                             policy, reference
    Ψ(y) = Σ_t γ V(s_{t+1}) − V(s_t)                             teacher
    L    = −log σ( β[ρ_w − ρ_l] − α[Ψ_w − Ψ_l] ), mean over the step's pairs

Letters: P pairs of a micro-batch (2P responses, chosen first), N response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tvkd_fast.data import PairBatch, Scores
from tvkd_fast.distributed import World, sync_gradients, whole
from tvkd_fast.losses import TVKDOutput, segment_sums, sft_loss, shaping_returns, tvkd_loss
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.ops import soft_values, unchecked
from tvkd_fast.training.config import LossConfig
from tvkd_fast.training.scoring import Scorer


class NonFiniteStepError(FloatingPointError):
    """A loss or gradient was NaN or inf; `pairs` are the step's, and the weights are as they were."""

    def __init__(self, pairs: list[int]) -> None:
        super().__init__(
            f"loss or gradient is not finite in the step of pairs {pairs}: the weights were left as they were. Lower "
            "--optim.lr, add --optim.warmup_steps, or look at these pairs; the newest checkpoint is whole"
        )
        self.pairs = pairs


@dataclass(frozen=True)
class StepOutput:
    """One step's numbers, still on the device: reading one waits for it."""

    loss: Tensor
    """Of the whole step, the same in every process."""
    grad_norm: Tensor
    """Likewise, before it was clipped."""
    outputs: list[TVKDOutput]
    """One a micro-batch of this process; none in sft."""
    length_differences: list[Tensor]
    """One a micro-batch of this process, (P,): chosen length − rejected length, in tokens; none in sft."""
    skipped: bool = False
    """Whether the weights were left as they were, since loss or gradient was not finite."""


def train_step(
    policy: PolicyWithHead,
    scorer: Scorer,
    batches: Sequence[PairBatch],
    optimizer: torch.optim.Optimizer,
    config: LossConfig,
    *,
    objective: str,
    clip_norm: float,
    world: World | None = None,
    skip_nonfinite: bool = False,
) -> StepOutput:
    """Accumulate the gradient of the mean over all pairs of the step, clip it, and update if it is finite.

    `batches` are this process's part of the step, as many as every other's in `world`. Raises NonFiniteStepError,
    unless such steps are to be passed over.
    """
    world = World(batches[0].labels.device) if world is None else world
    counts = torch.tensor([[batch.num_pairs, batch.labels.numel()] for batch in batches], device=world.device)
    num_pairs, num_tokens = world.sum(counts.sum(0))
    losses, outputs, lengths = [], [], []
    # NaN and inf reach the loss of every process, and all of them decide on it together.
    with unchecked():
        for i, batch in enumerate(batches):
            sync_gradients(policy, now=i == len(batches) - 1)
            policy_logps = segment_sums(policy(batch), batch.cu_seqlens)
            if objective == "sft":
                loss = sft_loss(policy_logps, num_tokens)
            else:
                scores = scorer.of(batch)
                assert scores.ref_logps is not None
                if batch.num_pairs:
                    out = preference_output(policy_logps, batch, scores, config, objective)
                    # Summed, then divided once by the step's pairs: micro-batches of any size weigh as their pairs do.
                    loss = out.losses.sum() / num_pairs
                    outputs.append(out)
                    lengths.append(length_differences(batch))
                else:
                    loss = policy_logps.sum()
            # Sharded gradients are averaged over processes, and the loss is a sum over them.
            (loss * world.size).backward()
            losses.append(loss.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = whole(clip_grad_norm_(parameters, clip_norm if clip_norm > 0 else float("inf")))
    loss = world.sum(torch.stack(losses).sum())
    finite = bool(torch.isfinite(loss) & torch.isfinite(grad_norm))
    if finite:
        optimizer.step()
    elif not skip_nonfinite:
        pairs = world.everyone([int(i) for batch in batches for i in batch.pairs])
        raise NonFiniteStepError(sorted(i for of_one in pairs for i in of_one))
    optimizer.zero_grad(set_to_none=True)
    return StepOutput(loss, grad_norm, outputs, lengths, skipped=not finite)


def preference_output(
    policy_logps: Tensor, batch: PairBatch, scores: Scores, config: LossConfig, objective: str
) -> TVKDOutput:
    """The shaped loss of one micro-batch, from (2P,) policy log-probabilities and what reference and teacher say."""
    values = values_of(scores, config) if objective == "tvkd" else None
    psi = None
    if values is not None:
        cu_states, ended = scores.boundaries(batch)
        psi = shaping_returns(values, cu_states, gamma=config.gamma, terminal=config.terminal, ended=ended)
    ref_logps = torch.zeros_like(policy_logps) if scores.ref_logps is None else scores.ref_logps
    return tvkd_loss(
        policy_logps,
        ref_logps.to(policy_logps.dtype),
        psi,
        beta=config.beta,
        alpha=config.alpha,
        label_smoothing=config.label_smoothing,
    )


def values_of(scores: Scores, config: LossConfig) -> Tensor | None:
    """(M,) soft values V of every response state; None where the scores hold nothing to make them of."""
    scale = config.beta if config.value_scale is None else config.value_scale
    if config.value_from == "implicit_reward":
        return None if scores.reward is None else scores.reward * scale
    if scores.lse is None or scores.lse_kappa is None:
        return None
    return soft_values(
        scores.lse, scores.lse_kappa, kappa=config.kappa, value_scale=scale, value_from=config.value_from
    )


def length_differences(batch: PairBatch) -> Tensor:
    """(P,) chosen length − rejected length, in tokens."""
    chosen, rejected = batch.cu_seqlens.diff().chunk(2)
    return chosen - rejected
