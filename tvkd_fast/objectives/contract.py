"""The contract of an objective: settings, needs, and a loss from numbers per response.

Letters: P pairs, 2P responses, chosen first, then rejected in the same order; M teacher states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import Enum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tvkd_fast.data import PairBatch
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import FusedLMHead, Lora, PolicyWithHead
from tvkd_fast.objectives.divergences.joint_numbers import Distributions, Joint, KnownUpstream, Whose, joint_numbers
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
    TEACHER_STATES = "the teacher's states"
    TEACHER_TOP_K = "the teacher's top k"
    TEACHER_SAMPLES = "samples of the teacher's distributions"
    REFERENCE_STATES = "the reference's states"
    BASE_STATES = "the states of the teacher's own reference"
    REWARDS = "rewards, which are columns of the data"
    LABELS = "labels of single responses, and responses to other prompts"
    COLLISIONS = "the policy's log Σp², by one more product of its head"
    SAMPLER_LOGPS = "the sampler's log-probabilities, which samples of the run itself have"


TEACHER = frozenset(
    {
        Need.TEACHER_SUMS,
        Need.TEACHER_REWARDS,
        Need.TEACHER_LOGPS,
        Need.TEACHER_STATES,
        Need.TEACHER_TOP_K,
        Need.TEACHER_SAMPLES,
        Need.BASE_STATES,
    }
)
SCORED = TEACHER | {Need.REFERENCE, Need.REFERENCE_STATES}
"""Needs for which frozen models are run, or a cache is read."""
NOT_CACHED = frozenset({Need.REFERENCE_STATES, Need.BASE_STATES})
"""Needs that no cache of scores meets: those models are run beside the policy."""
_STATES: dict[Whose, Need] = {
    "teacher": Need.TEACHER_STATES,
    "ref": Need.REFERENCE_STATES,
    "base": Need.BASE_STATES,
}
KEPT_NEEDS = {"topk": Need.TEACHER_TOP_K, "sampled": Need.TEACHER_SAMPLES}
Divisor = Literal["pairs", "chosen_tokens", "tokens"]


@dataclass(frozen=True)
class Factors:
    """The numbers by which summed losses are multiplied: one over what the whole step has of each divisor."""

    pairs: Tensor
    """()"""
    chosen_tokens: Tensor
    """(): tokens of the chosen responses."""
    tokens: Tensor
    """(): tokens of all responses that are computed."""

    def of(self, divisor: Divisor) -> Tensor:
        found: Tensor = getattr(self, divisor)
        return found


@dataclass(frozen=True)
class PolicyNumbers:
    """A batch's responses under the policy."""

    logps: Tensor
    """(2P,) log-probabilities summed over each response's tokens, nats, differentiable; (P,) of the chosen alone."""
    lengths: Tensor
    """The same shape, int64: tokens of each response."""
    log_collisions: Tensor | None = None
    """The same shape: Σ_t log Σ_v π_θ(v|s_t)² of each response, nats, without a gradient; under `Need.COLLISIONS`."""
    joint: Mapping[Joint, Tensor] = field(default_factory=dict)
    """(N,) of each of the objective's `joint` keys: a number of every response token, nats, differentiable."""
    token_logps: Tensor | None = None
    """(N,) the summands of `logps`, where an objective's own `numbers` gives them."""

    distances: Tensor | None = None
    """(2P,) a distance of each response that the objective's own `numbers` measures, differentiable; None where
    `loss` is asked for its dependence on log-probabilities alone."""

    def summed(self, key: Joint, batch: PairBatch) -> Tensor:
        """(2P,) sums of a key's numbers over each response's tokens, differentiable."""
        return segment_sums(self.joint[key], batch.cu_seqlens)

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
    divided_by: ClassVar[Divisor] = "pairs"
    """The divisor of the summed losses: the pairs, the chosen responses' tokens, or all response tokens of the step."""
    per_pair: ClassVar[bool] = True
    """Whether the loss of a pair depends on no other pair: then the head makes its gradient in the forward, pair by
    pair. Where it is True and wrong, the gradient is computed twice on a CPU, and a step on a GPU, which looks at no
    number, is refused as not finite."""
    linear: ClassVar[bool] = False
    """Whether the loss is linear in the policy's numbers: then walks over two vocabularies make their gradient in the
    forward. Where it is True and wrong, what is said of `per_pair` holds."""
    on_policy: ClassVar[bool] = False
    """Whether its responses are the policy's own samples, of its own law, unless a run says otherwise."""
    more_products: ClassVar[int] = 0
    """Products of the head that its own `numbers` take beside the log-probabilities', with their gradients."""
    trains_beside: ClassVar[bool] = False
    """Whether `attach` adds parameters, which are trained in one process."""
    changes_input: ClassVar[bool] = False
    """Whether `changed` makes other input of a training batch: scores on disk are not of it."""
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

    @property
    def linear_joint(self) -> tuple[Joint, ...]:
        """Return those of `joint` in which the loss is linear, whatever it is in the log-probabilities."""
        return self.joint if self.linear else ()

    @property
    def joint(self) -> tuple[Joint, ...]:
        """Return the numbers of the policy's and other models' distributions that `loss` reads, none by default;
        `needs` names those models' states."""
        return ()

    @property
    def whole_head(self) -> bool:
        """Whether heads are read whole, which no process has of a shared vocabulary."""
        return bool(self.joint) or not self.needs.isdisjoint(_STATES.values())

    @property
    def alone(self) -> bool:
        """Whether no mixture can hold it: it measures the policy itself, or changes what is trained or read."""
        return type(self).numbers is not Objective.numbers or self.trains_beside or self.changes_input

    @property
    def teacher_lora(self) -> Lora | None:
        """Return the adapters that learn in the teacher, which then has to be online; none by default."""
        return None

    def check_policy(self, policy: PolicyWithHead) -> None:
        """Raise ValueError where the settings do not fit the policy, whose weights may not be there yet."""

    def attach(self, policy: PolicyWithHead, teacher: nn.Module | None, scores: Callable[[], Scores]) -> None:
        """Put into `policy.beside` what is trained with it (`trains_beside`): called once, before a run makes its
        optimizer. `teacher` is the online one, and `scores` gives a few pairs' of the run."""

    def changed(self, batch: PairBatch, seed: int, step: int) -> PairBatch:
        """Return the batch, on the host, as training shows it to all models: a function of the arguments alone."""
        return batch

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        """The losses of a batch with P ≥ 1 pairs, whose `scores` hold what `needs` names."""
        raise NotImplementedError

    def total(self, out: ObjectiveOutput, factors: Factors | None, pairs: Tensor | None = None) -> Tensor:
        """() what a batch adds to the step's loss, of all its pairs or of some; the sum of the losses without
        `factors`."""
        losses = (out.losses if pairs is None else out.losses[pairs]).sum()
        return losses if factors is None else losses * factors.of(self.divided_by)

    def numbers(
        self, policy: PolicyWithHead, scores: Scores, batch: PairBatch, factors: Factors | None = None
    ) -> PolicyNumbers:
        """What the loss wants of the policy, which is called once. With `factors`, by which the summed losses are going
        to be multiplied, the head makes its gradient in that call where the loss allows it."""

        def upstream(log_collisions: Tensor | None = None) -> Upstream | None:
            return None if factors is None else self.upstream(scores, batch, log_collisions, factors)

        if self.joint:
            found: PolicyNumbers = policy(
                batch, walk=lambda hidden, head: self._of_both(hidden, head, scores, batch, factors)
            )
            return found
        if Need.COLLISIONS not in self.needs:
            return PolicyNumbers(segment_sums(policy(batch, upstream()), batch.cu_seqlens), batch.lengths)
        logps, per_token = policy(batch, lambda x: upstream(segment_sums(x, batch.cu_seqlens)), collisions=True)
        sums = segment_sums(per_token, batch.cu_seqlens)
        return PolicyNumbers(segment_sums(logps, batch.cu_seqlens), batch.lengths, sums)

    def _of_both(
        self, hidden: Tensor, head: FusedLMHead, scores: Scores, batch: PairBatch, factors: Factors | None
    ) -> PolicyNumbers:
        collisions = None
        if Need.COLLISIONS in self.needs:
            collisions = segment_sums(head.log_collisions(hidden), batch.cu_seqlens)
        known = KnownUpstream() if factors is None else self._known(scores, batch, collisions, factors)
        logps, joint = joint_numbers(hidden, head, batch, self.joint, distributions(scores), known)
        return PolicyNumbers(segment_sums(logps, batch.cu_seqlens), batch.lengths, collisions, joint)

    def _known(
        self, scores: Scores, batch: PairBatch, log_collisions: Tensor | None, factors: Factors
    ) -> KnownUpstream:
        """The derivatives of the batch's `total` that are known before the policy's numbers are."""
        constant = self.linear_joint
        if not constant or not batch.num_pairs:
            return KnownUpstream()
        # Where the loss is linear in a number, its derivative is the same at any: here at a policy that is certain.
        numbers = self._numbers_of(torch.zeros_like(batch.lengths, dtype=torch.float64), batch, log_collisions)
        leaves = [numbers.logps, *(numbers.joint[key] for key in constant)]
        with torch.enable_grad():
            total = self.total(self.loss(numbers, scores, batch), factors)
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        of_logps, *others = (
            torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)
        )
        pairwise = None if self.linear else self.upstream(scores, batch, log_collisions, factors)
        return KnownUpstream(dict(zip(constant, others, strict=True)), of_logps if self.linear else None, pairwise)

    def _numbers_of(self, logps: Tensor, batch: PairBatch, log_collisions: Tensor | None) -> PolicyNumbers:
        """Leaves to differentiate a loss by: these log-probabilities, and zeros for all else."""
        joint = {key: logps.new_zeros(len(batch.labels)).requires_grad_() for key in self.joint}
        return PolicyNumbers(logps.requires_grad_(), batch.lengths, log_collisions, joint)

    def upstream(
        self,
        scores: Scores,
        batch: PairBatch,
        log_collisions: Tensor | None = None,
        factors: Factors | None = None,
    ) -> Upstream | None:
        """The derivative of the batch's `total` by responses' log-probabilities, as the head asks for it before all of
        the batch are known; None where a pair's needs other pairs, or what a walk has yet to find. `log_collisions` as
        in `PolicyNumbers`."""
        if not self.per_pair or not batch.num_pairs or not set(self.joint) <= set(self.linear_joint):
            return None
        lengths, paired = batch.lengths, Need.REJECTED in self.needs

        def derivative(logps: Tensor, responses: Tensor) -> Tensor:
            # Responses that are not asked for stand in by a nat per token; their pairs' losses are left out.
            unknown = -lengths.to(logps.dtype)
            everything = unknown.index_put((responses,), logps.detach())
            with torch.enable_grad():
                out = self.loss(self._numbers_of(everything, batch, log_collisions), scores, batch)
                # In rising order the chosen ones come first, and their places are their pairs'.
                pairs = responses[: len(responses) // 2] if paired else responses
                total = self.total(out, factors, pairs)
                (grad,) = torch.autograd.grad(total, everything, allow_unused=True)
            # A loss that reads no log-probabilities hands nothing down to them.
            return (torch.zeros_like(everything) if grad is None else grad)[responses]

        return Upstream(derivative, batch.cu_seqlens, paired=paired, lengths=batch.response_lengths)

    def without(self, missing: Collection[Need]) -> Objective | None:
        """The objective whose margins are shown where `missing` numbers are not known; None where there is none."""
        if not self.needs & frozenset(missing):
            return self
        return None if self.fallback is None else self.fallback.without(missing)

    @property
    def fallback(self) -> Objective | None:
        """The objective whose rewards stand in where numbers that this one needs are missing; none by default."""
        return None

    def describe(self) -> str:
        """The settings in a line, as a plan shows them."""
        return ", ".join(f"{name} {value}" for name, value in self.settings().items())

    def settings(self) -> dict[str, Any]:
        assert is_dataclass(self)
        return asdict(self)


def known(scores: Scores, batch: PairBatch | None = None) -> frozenset[Need]:
    """The needs that these scores, the batch's own columns, and any policy meet."""
    frozen = distributions(scores)
    found = {Need.REJECTED, Need.COLLISIONS} | {_STATES[x] for x in frozen.of} | {KEPT_NEEDS[x] for x in frozen.kept}
    given = {
        Need.REFERENCE: scores.ref_logps,
        Need.TEACHER_REWARDS: scores.reward,
        Need.TEACHER_LOGPS: scores.teacher_logps,
    }
    if batch is not None:
        given |= {Need.LABELS: batch.desirable, Need.REWARDS: batch.rewards, Need.SAMPLER_LOGPS: batch.sampler_logps}
    if scores.lse is not None and scores.lse_kappa is not None:
        found.add(Need.TEACHER_SUMS)
    return frozenset(found | {need for need, x in given.items() if x is not None})


def distributions(scores: Scores) -> Distributions:
    """The frozen models' distributions that the scores hold."""
    found = {whose: (getattr(scores, f"{whose}_hidden"), getattr(scores, f"{whose}_head")) for whose in _STATES}
    kept = {}
    if scores.topk_ids is not None and scores.topk_logps is not None:
        kept["topk"] = scores.topk_ids, scores.topk_logps.exp()
    if scores.sampled_ids is not None and scores.sampled_shares is not None:
        kept["sampled"] = scores.sampled_ids, scores.sampled_shares
    return Distributions({whose: (hidden, head) for whose, (hidden, head) in found.items() if head is not None}, kept)
