"""The contract of an objective: settings, needs, and a loss from numbers per response.

Letters: P pairs, 2P responses, chosen first, then rejected in the same order; M teacher states.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.ops import Upstream
from tvkd_fast.scoring.layout import Scores


class Need(Enum):
    """Inputs of an objective's loss, beside the chosen responses' log-probabilities under the policy."""

    REJECTED = "rejected responses"
    REFERENCE = "the reference's log-probabilities"
    TEACHER_SUMS = "the teacher's log-sum-exps"
    TEACHER_REWARDS = "the teacher's rewards over its own reference"


TEACHER = frozenset({Need.TEACHER_SUMS, Need.TEACHER_REWARDS})
SCORED = TEACHER | {Need.REFERENCE}
"""Needs for which frozen models are run, or a cache is read."""


@dataclass(frozen=True)
class PolicyNumbers:
    """A batch's responses under the policy."""

    logps: Tensor
    """(2P,) log-probabilities summed over each response's tokens, nats, differentiable; (P,) of the chosen alone."""
    lengths: Tensor
    """The same shape, int64: tokens of each response."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """The losses, and what metrics and evaluation show of pairs. Only `losses` carries gradients."""

    losses: Tensor
    """(P,): the step sums them, and divides once by the pairs (or tokens) of the whole step."""
    margins: Tensor | None = None
    """(P,): by how much the chosen response's reward is the larger. None where nothing is compared."""
    chosen_rewards: Tensor | None = None
    """(P,)"""
    rejected_rewards: Tensor | None = None
    """(P,)"""
    shaping_margins: Tensor | None = None
    """(P,): what shaping takes from the margin. None without shaping."""


@dataclass(kw_only=True)
class Objective:
    """The base of all objectives: each is a dataclass of its settings, in a file of its own, with `@objective(name)`.

    Whoever adds one defines `needs` and `loss`; scoring, caches, metrics, evaluation, the plan and the command line
    follow from them.
    """

    name: ClassVar[str]
    """The name on the command line and in recipes; `@objective` sets it."""
    divided_by: ClassVar[Literal["pairs", "tokens"]] = "pairs"
    """The divisor of the summed losses: the pairs of the step, or the response tokens of the step."""
    per_pair: ClassVar[bool] = True
    """Whether the loss of a pair depends on no other pair: then the head makes its gradient in the forward, pair by
    pair. Where it is True and wrong, the gradient is computed twice on a CPU, and a step on a GPU, which looks at no
    number, is refused as not finite."""

    @property
    def teacher_kappa(self) -> float:
        """κ at which TEACHER_SUMS are wanted."""
        return 1.0

    @property
    def needs(self) -> frozenset[Need]:
        """Return the inputs of `loss`, which may depend on the settings."""
        raise NotImplementedError

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        """The losses of a batch with P ≥ 1 pairs, whose `scores` hold what `needs` names."""
        raise NotImplementedError

    def upstream(self, scores: Scores, batch: PairBatch) -> Upstream | None:
        """The derivative of the summed losses by responses' log-probabilities, as the head asks for it before all of
        the batch are known; None where a pair's needs other pairs."""
        if not self.per_pair or not batch.num_pairs:
            return None
        lengths, paired = batch.lengths, Need.REJECTED in self.needs

        def derivative(logps: Tensor, responses: Tensor) -> Tensor:
            # Responses that are not asked for stand in by a nat per token; their pairs' losses are left out.
            unknown = -lengths.to(logps.dtype)
            everything = unknown.index_put((responses,), logps.detach()).requires_grad_()
            with torch.enable_grad():
                losses = self.loss(PolicyNumbers(everything, lengths), scores, batch).losses
                # In rising order the chosen ones come first, and their places are their pairs'.
                pairs = responses[: len(responses) // 2] if paired else responses
                (grad,) = torch.autograd.grad(losses[pairs].sum(), everything)
            return grad[responses]

        return Upstream(derivative, batch.cu_seqlens, paired=paired, lengths=batch.response_lengths)

    def without(self, missing: Collection[Need]) -> Objective | None:
        """The objective whose margins are shown where `missing` numbers are not known; None where there is none."""
        return None if self.needs & frozenset(missing) else self

    def describe(self) -> str:
        """The settings in a line, as a plan shows them."""
        return ", ".join(f"{name} {value}" for name, value in self.settings().items())

    def settings(self) -> dict[str, Any]:
        assert is_dataclass(self)
        return asdict(self)


def known(scores: Scores) -> frozenset[Need]:
    """The needs that these scores meet."""
    found = {Need.REJECTED}
    if scores.ref_logps is not None:
        found.add(Need.REFERENCE)
    if scores.lse is not None and scores.lse_kappa is not None:
        found.add(Need.TEACHER_SUMS)
    if scores.reward is not None:
        found.add(Need.TEACHER_REWARDS)
    return frozenset(found)


def check_teacher_reference(teacher: str | None, teacher_reference: str | None, objective: Objective) -> None:
    """Raise ValueError where a teacher's own reference is wanted and missing, or given and not wanted."""
    wanted = Need.TEACHER_REWARDS in objective.needs
    if teacher is not None and wanted and teacher_reference is None:
        raise ValueError(
            "value_from='implicit_reward' is what the teacher gained over its own reference, the model that it was "
            "before DPO: set --teacher_reference"
        )
    if teacher_reference is not None and not (wanted and teacher is not None):
        raise ValueError(
            "--teacher_reference serves --teacher under --loss.value_from implicit_reward: set all or none"
        )
