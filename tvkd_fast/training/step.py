"""The method on one page: from a step's micro-batches of pairs to one update of the policy.

    policy's numbers (log π_θ(y), lengths), scores (reference, teacher) → objective.loss → losses, one per pair

With the objective of TVKD, for example:

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

from tvkd_fast.data import PairBatch
from tvkd_fast.distributed import World, sync_gradients
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.objectives import Factors, Objective, ObjectiveOutput
from tvkd_fast.ops import unchecked
from tvkd_fast.scoring import Scorer
from tvkd_fast.training.baseline import with_baseline
from tvkd_fast.training.optim import clip_gradients, update
from tvkd_fast.transfer import to_device


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
    """The loss of the whole step, the same in every process."""
    grad_norm: Tensor
    """The policy's, likewise, before it was clipped."""
    outputs: list[ObjectiveOutput]
    """One per micro-batch of this process whose pairs were compared."""
    length_differences: list[Tensor]
    """(P,) each, beside `outputs`: chosen length − rejected length, in tokens."""
    finite: Tensor
    """() bool: whether loss and gradient were. Where they were not, the weights are as they were."""
    baseline: Tensor | None = None
    """() nats: the KL divergence from which responses with labels are measured."""


def train_step(
    policy: PolicyWithHead,
    scorer: Scorer,
    batches: Sequence[PairBatch],
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    *,
    clip_norm: float,
    world: World | None = None,
    skip_nonfinite: bool = False,
    mismatched: Sequence[PairBatch] = (),
) -> StepOutput:
    """Accumulate the gradient of the objective's mean over the step, clip it, and update if it is finite.

    `batches` are this process's part of the step, as many as every other's in `world`, and so are `mismatched`, the
    step's responses to other prompts, for an objective under `Need.LABELS`. Raises NonFiniteStepError where it is not
    finite; with `skip_nonfinite` nobody looks, and the host does not wait for the device.
    """
    world = World(batches[0].labels.device) if world is None else world
    counts = torch.tensor([[batch.num_pairs, batch.chosen_tokens, batch.labels.numel()] for batch in batches]).sum(0)
    # Sharded gradients are averaged over processes, and the loss is a sum over them.
    factors = Factors(*(world.size / world.all_reduce(to_device(counts, world.device)).double()))
    losses, outputs, lengths = [], [], []
    # NaN and inf reach the loss of every process, and all of them decide on it together.
    with unchecked():
        if mismatched:
            batches = with_baseline(policy, scorer, batches, mismatched, world)
        for i, batch in enumerate(batches):
            sync_gradients(policy, now=i == len(batches) - 1)
            scores = scorer.of(batch)
            # The loss says beforehand what it will hand down, so that the head makes its gradient in the forward.
            numbers = objective.numbers(policy, scores, batch, factors)
            if batch.num_pairs:
                out = objective.loss(numbers, scores, batch)
                # Summed, then divided once by the whole step's: micro-batches of any size weigh as their pairs do.
                loss = objective.total(out, factors)
                if out.margins is not None:
                    outputs.append(out)
                    lengths.append(batch.length_differences)
            else:
                loss = numbers.logps.sum()
            loss.backward()
            losses.append(loss.detach() / world.size)
    grad_norm, finite = clip_gradients(optimizer, clip_norm)
    loss = world.all_reduce(torch.stack(losses).sum())
    finite = finite & torch.isfinite(loss)
    update(optimizer, finite)
    if not skip_nonfinite and not bool(finite):
        pairs = world.all_gather([int(i) for batch in batches for i in batch.pairs])
        raise NonFiniteStepError(sorted(i for of_one in pairs for i in of_one))
    optimizer.zero_grad(set_to_none=True)
    return StepOutput(loss, grad_norm, outputs, lengths, finite, batches[0].baseline)
