"""The scores of reference and teacher for a batch: from the models themselves, or from a cache.

Letters: P pairs, M response states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tvkd_fast.data import MicroBatching, PairBatch, PairDataset
from tvkd_fast.distributed import World
from tvkd_fast.losses import running_sums, segment_sums
from tvkd_fast.models import FusedLMHead, PolicyWithHead, TeacherWithHead, WithoutAdapters
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.distributions import kept_of
from tvkd_fast.scoring.kinds import TOKEN_KINDS, VALUES, kind_of, token_kinds
from tvkd_fast.scoring.layout import STATE_NAMES, ScoreLayout, Scores, in_order
from tvkd_fast.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Scorer(Protocol):
    """Answers with the numbers of reference and teacher; None for what it has no model of."""

    def of(self, batch: PairBatch) -> Scores: ...


class RewardTeacher(nn.Module):
    """The teacher of `value_from="implicit_reward"`: what it gained over its own reference, up to every response state.

    `forward(batch)` returns Σ_{k<t} log π_φ(y_{k+1}|s_k) − log π_φref(y_{k+1}|s_k), (M,) float32, 0 at s_0, unless
    `values` is false, and the (N,) log π_φ(y_{k+1}|s_k), which are None unless `logps`; behind them what `walk` makes
    of the teacher's states and head, as in `TeacherWithHead`.
    """

    def __init__(self, teacher: PolicyWithHead, reference: PolicyWithHead) -> None:
        super().__init__()
        self.teacher, self.reference = teacher, reference

    @property
    def model(self) -> PreTrainedModel:
        return self.teacher.model

    @property
    def policies(self) -> tuple[PolicyWithHead, ...]:
        return self.teacher, self.reference

    @property
    def vocab_size(self) -> int:
        return min(policy.vocab_size for policy in self.policies)

    def forward(
        self,
        batch: PairBatch,
        *,
        values: bool = True,
        logps: bool = False,
        walk: Callable[[Tensor, FusedLMHead], Any] | None = None,
    ) -> tuple[Any, ...]:
        if walk is None:
            own, walked = self.teacher(batch), []
        else:
            of_both = lambda hidden, head: (head(hidden, batch.labels), walk(hidden, head))  # noqa: E731
            own, *walked = self.teacher(batch, walk=of_both)
        rewards = [running_sums(own - self.reference(batch), batch.cu_seqlens)] if values else []
        return *rewards, own if logps else None, *walked


Teacher = TeacherWithHead | RewardTeacher


@dataclass(frozen=True)
class TeacherTokens:
    """A dataset in the tokens of a teacher that has a tokenizer of its own, and how many of them it takes at once."""

    dataset: PairDataset
    batching: MicroBatching


class OnlineScorer:
    """Runs the frozen models on every batch; the teacher on tokens of its own, where it is given some.

    `of_teacher` is what it is asked for, all in one pass: its values (sums, or rewards of a `RewardTeacher`), the
    responses' log-probabilities, and what is kept of its distributions, by the names of `tvkd score --keep`. With
    `reference_states` the reference answers with its states as well, and `base`, the teacher's own reference, with
    nothing else; the heads of states are taken once, a collective where they are sharded.
    """

    def __init__(
        self,
        reference: PolicyWithHead | WithoutAdapters | None,
        teacher: Teacher | None,
        teacher_tokens: TeacherTokens | None = None,
        world: World | None = None,
        *,
        of_teacher: Collection[str] = VALUES,
        reference_states: bool = False,
        base: PolicyWithHead | None = None,
    ) -> None:
        self.reference, self.teacher, self.teacher_tokens = reference, teacher, teacher_tokens
        self.world, self.of_teacher = world, of_teacher
        self.base = base
        device = None if world is None else world.device
        self.teacher_head = None
        if teacher is not None and "states" in of_teacher:
            self.teacher_head = teacher.policies[0].head.gathered(device)
        self.teacher_learns = False
        """Whether the numbers of a batch have a gradient by what learns in the teacher."""
        self.ref_head = reference.head.gathered(device) if reference_states and reference is not None else None
        self.base_head = None if base is None else base.head.gathered(device)

    def asking(self, of_teacher: Collection[str]) -> OnlineScorer:
        """The same models, the teacher asked for these numbers; no teacher where they are none."""
        teacher = self.teacher if of_teacher else None
        tokens = self.teacher_tokens if of_teacher else None
        return OnlineScorer(self.reference, teacher, tokens, self.world, of_teacher=of_teacher)

    def names_of(self, kind: str) -> tuple[str, ...]:
        """What the teacher is asked for, by the names of a manifest's numbers."""
        if kind_of(kind) in TOKEN_KINDS:
            return (kind,)
        if kind == "logps":
            return ("teacher_logps",)
        return ("reward",) if isinstance(self.teacher, RewardTeacher) else ("lse", "lse_kappa")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the numbers that it answers with, in a manifest's order."""
        found = set() if self.reference is None else {"ref_logps"}
        if self.teacher is not None:
            found.update(*(self.names_of(kind) for kind in self.of_teacher))
            found.update(() if self.teacher_tokens is None else ("teacher_states", "teacher_ended"))
        return in_order(found)

    def layout(self, dataset: PairDataset) -> ScoreLayout:
        """Return the layout of the numbers that it computes for a dataset."""
        return ScoreLayout.of(self._read(dataset))

    def teacher_reads(self, dataset: PairDataset) -> str | None:
        """Fingerprint of the tokens that the teacher reads of a dataset; None without a teacher."""
        return None if self.teacher is None else self._read(dataset).fingerprint

    def _read(self, dataset: PairDataset) -> PairDataset:
        return dataset if self.teacher_tokens is None else self.teacher_tokens.dataset

    def of(self, batch: PairBatch) -> Scores:
        with torch.set_grad_enabled(self.teacher_learns and torch.is_grad_enabled()):
            return self._of(batch)

    def _of(self, batch: PairBatch) -> Scores:
        ref_logps, ref_hidden = self._of_reference(batch)
        if self.teacher is None:
            found = Scores()
        elif self.teacher_tokens is None:
            found = self._of_teacher(batch)
        else:
            found = self._in_its_own_tokens(batch, self.teacher_tokens)
        base_hidden = None if self.base is None else self.base(batch, walk=lambda hidden, head: hidden)
        return replace(
            found,
            ref_logps=ref_logps,
            ref_hidden=ref_hidden,
            ref_head=self.ref_head,
            base_hidden=base_hidden,
            base_head=self.base_head,
        )

    def _of_reference(self, batch: PairBatch) -> tuple[Tensor | None, Tensor | None]:
        """Summed log-probabilities, and states where they are wanted."""
        if self.reference is None:
            return None, None
        if self.ref_head is None:
            logps, hidden = self.reference(batch), None
        else:
            logps, hidden = self.reference(batch, walk=lambda hidden, head: (head(hidden, batch.labels), hidden))
        return segment_sums(logps, batch.cu_seqlens), hidden

    def _of_teacher(self, batch: PairBatch) -> Scores:
        assert self.teacher is not None
        values, logps = (name in self.of_teacher for name in ("values", "logps"))
        kinds = token_kinds(self.of_teacher)
        answers = list(
            self.teacher(
                batch,
                values=values,
                logps=logps,
                walk=(lambda hidden, head: kept_of(kinds, batch, hidden, head.whole)) if kinds else None,
            )
        )
        kept = answers.pop() if kinds else {}
        of_tokens = answers.pop()
        found: dict[str, Any] = dict(zip(self.names_of("values"), answers, strict=False))
        if logps:
            found["teacher_logps"] = segment_sums(of_tokens, batch.cu_seqlens)
        return Scores(**found, **kept, teacher_head=self.teacher_head if "states" in kinds else None)

    def _in_its_own_tokens(self, batch: PairBatch, tokens: TeacherTokens) -> Scores:
        """The teacher's rows are packed anew: of the same pairs it may have more tokens than fit one row."""
        pairs = [tokens.dataset[i] for i in batch.pairs.tolist()]
        layout = ScoreLayout.of(pairs)
        found: dict[str, Tensor] = {}
        rows = list(tokens.batching.batches(pairs, range(len(pairs))))
        # A sharded teacher is called by every process as often as by the others.
        for own in tokens.batching.filled(
            rows, len(rows) if self.world is None else self.world.all_reduce_max(len(rows))
        ):
            places = {True: layout.states(own.pairs), False: layout.responses(own.pairs)}
            sizes = {True: layout.num_states, False: 2 * len(pairs)}
            for name, numbers in vars(self._of_teacher(own.to(batch.labels.device))).items():
                if numbers is not None:
                    a_state = name in STATE_NAMES
                    found.setdefault(name, numbers.new_zeros(sizes[a_state]))[places[a_state]] = numbers
        all_pairs = torch.arange(len(pairs))
        order = layout.states(all_pairs)
        ended = torch.tensor([[pair.chosen_ended, pair.rejected_ended] for pair in pairs], dtype=torch.bool)
        of_responses = {
            "teacher_states": layout.bounds.diff()[layout.responses(all_pairs)],
            "teacher_ended": ended.view(len(pairs), 2).T.flatten(),
        }
        in_batch: dict[str, Any] = {
            name: x[order if name in STATE_NAMES else layout.responses(all_pairs)] for name, x in found.items()
        }
        in_batch |= {name: to_device(x, batch.labels.device) for name, x in of_responses.items()}
        return Scores(**in_batch)


class CachedScorer:
    """Looks the batch's scores up in a cache; of what is kept per token the `kinds` alone, where they are given."""

    def __init__(self, cache: ScoreCache, kinds: Collection[str] | None = None) -> None:
        self.cache, self.kinds = cache, kinds

    def of(self, batch: PairBatch) -> Scores:
        return self.cache.of(batch.pairs, batch.labels.device, sides=batch.sides, kinds=self.kinds)
