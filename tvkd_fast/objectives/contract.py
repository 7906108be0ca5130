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
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.ops import Upstream
from tvkd_fast.ranges import check_numbers
from tvkd_fast.scoring.layout import Scores


class Need(Enum):
    """Inputs of an objective's loss, beside the chosen responses' log-probabilities under the policy."""

    REJECTED = "rejected responses"
    REFERENCE = "the reference's log-probabilities"
    TEACHER_SUMS = "the teacher's log-sum-exps"
    TEACHER_REWARDS = "the teacher's rewards over its own reference"
    TEACHER_LOGPS = "the teacher's log-probabilities"
    REWARDS = "rewards, which are columns of the data"
    LABELS = "labels of single responses, and responses to other prompts"
    COLLISIONS = "the policy's log Σp², by one more product of its head"


TEACHER = frozenset({Need.TEACHER_SUMS, Need.TEACHER_REWARDS, Need.TEACHER_LOGPS})
SCORED = TEACHER | {Need.REFERENCE}
"""Needs for which frozen models are run, or a cache is read."""


@dataclass(frozen=True)
class PolicyNumbers:
    """A batch's responses under the policy."""

    logps: Tensor
    """(2P,) log-probabilities summed over each response's tokens, nats, differentiable; (P,) of the chosen alone."""
    lengths: Tensor
    """The same shape, int64: tokens of each response."""
    log_collisions: Tensor | None = None
    """The same shape: Σ_t log Σ_v π_θ(v|s_t)² of each response, nats, without a gradient; under `Need.COLLISIONS`."""

    @property
    def means(self) -> Tensor:
        """The log-probabilities per token, differentiable."""
        return self.logps / self.lengths

    def log_ratios(self, scores: Scores) -> Tensor:
        """ρ = log π_θ(y) − log π_ref(y), differentiable by the policy alone."""
        assert scores.ref_logps is not None
        return self.logps - scores.ref_logps.to(self.logps.dtype)


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

    @classmethod
    def of(cls, losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> ObjectiveOutput:
        """The output of a loss over rewards, which are detached here."""
        chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
        return cls(losses, chosen - rejected, chosen, rejected)


@dataclass(kw_only=True)
class Objective:
    """The base of all objectives: each is a dataclass of its settings, in a file of its own, with `@objective(name)`.

    Whoever adds one defines `needs` and `loss`; scoring, caches, metrics, evaluation, the plan and the command line
    follow from them. The first paragraph of its docstring is the formula of a pair's loss.
    """

    name: ClassVar[str]
    """The name on the command line and in recipes; `@objective` sets it."""
    source: ClassVar[str]
    """The place where the formula was read, such as "arXiv 2305.18290"; likewise."""
    divided_by: ClassVar[Literal["pairs", "tokens"]] = "pairs"
    """The divisor of the summed losses: the pairs of the step, or the response tokens of the step."""
    per_pair: ClassVar[bool] = True
    """Whether the loss of a pair depends on no other pair: then the head makes its gradient in the forward, pair by
    pair. Where it is True and wrong, the gradient is computed twice on a CPU, and a step on a GPU, which looks at no
    number, is refused as not finite."""
    several_rewards: ClassVar[bool] = False
    """Whether, under `Need.REWARDS`, it takes more than one column of them."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss")

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

    def numbers(
        self, policy: PolicyWithHead, scores: Scores, batch: PairBatch, factor: Tensor | None = None
    ) -> PolicyNumbers:
        """What the loss wants of the policy, which is called once. With `factor`, (), by which the summed losses are
        going to be multiplied, the head makes its gradient in that call where the loss allows it."""

        def upstream(log_collisions: Tensor | None = None) -> Upstream | None:
            found = None if factor is None else self.upstream(scores, batch, log_collisions)
            return None if found is None or factor is None else found.times(factor)

        if Need.COLLISIONS not in self.needs:
            return PolicyNumbers(segment_sums(policy(batch, upstream()), batch.cu_seqlens), batch.lengths)
        logps, per_token = policy(batch, lambda x: upstream(segment_sums(x, batch.cu_seqlens)), collisions=True)
        sums = segment_sums(per_token, batch.cu_seqlens)
        return PolicyNumbers(segment_sums(logps, batch.cu_seqlens), batch.lengths, sums)

    def upstream(self, scores: Scores, batch: PairBatch, log_collisions: Tensor | None = None) -> Upstream | None:
        """The derivative of the summed losses by responses' log-probabilities, as the head asks for it before all of
        the batch are known; None where a pair's needs other pairs. `log_collisions` as in `PolicyNumbers`."""
        if not self.per_pair or not batch.num_pairs:
            return None
        lengths, paired = batch.lengths, Need.REJECTED in self.needs

        def derivative(logps: Tensor, responses: Tensor) -> Tensor:
            # Responses that are not asked for stand in by a nat per token; their pairs' losses are left out.
            unknown = -lengths.to(logps.dtype)
            everything = unknown.index_put((responses,), logps.detach()).requires_grad_()
            with torch.enable_grad():
                losses = self.loss(PolicyNumbers(everything, lengths, log_collisions), scores, batch).losses
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


def known(scores: Scores, batch: PairBatch | None = None) -> frozenset[Need]:
    """The needs that these scores, the batch's own columns, and any policy meet."""
    found = {Need.REJECTED, Need.COLLISIONS}
    if scores.ref_logps is not None:
        found.add(Need.REFERENCE)
    if scores.lse is not None and scores.lse_kappa is not None:
        found.add(Need.TEACHER_SUMS)
    if scores.reward is not None:
        found.add(Need.TEACHER_REWARDS)
    if scores.teacher_logps is not None:
        found.add(Need.TEACHER_LOGPS)
    if batch is not None and batch.desirable is not None:
        found.add(Need.LABELS)
    if batch is not None and batch.rewards is not None:
        found.add(Need.REWARDS)
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


def check_labels(unpair: bool, objective: Objective) -> None:
    """Raise ValueError where single responses are made of pairs that the objective compares."""
    if unpair and Need.LABELS not in objective.needs:
        raise ValueError(f"{objective.name} reads no labels: leave --data.unpair out, or take --objective kto")


def check_selection(by: str, objective: Objective) -> None:
    """Raise ValueError where pairs are to be selected by a loss that a pair has not by itself."""
    if by != "no" and not (objective.per_pair and Need.REJECTED in objective.needs):
        raise ValueError(
            f"--data.select {by} goes by each pair's own loss, and {objective.name} has none: leave it out, or choose "
            "another --objective"
        )


def check_rewards(names: list[str] | None, objective: Objective) -> None:
    """Raise ValueError where rewards are named that the objective does not read, or more than it takes."""
    if names is None:
        return
    if Need.REWARDS not in objective.needs:
        raise ValueError(f"{objective.name} reads no rewards: leave --data.rewards out, or choose another --objective")
    if len(names) > 1 and not objective.several_rewards:
        raise ValueError(
            f"{objective.name} reads one reward and --data.rewards names {len(names)}: name one, such as [{names[0]}]"
        )
