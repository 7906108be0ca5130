"""The scores of reference and teacher for a batch: from the models themselves, or from a cache.

Letters: P pairs, M response states.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvkd_fast.data import MicroBatching, PairBatch, PairDataset
from tvkd_fast.distributed import World
from tvkd_fast.losses import running_sums, segment_sums
from tvkd_fast.models import PolicyWithHead, TeacherWithHead, WithoutAdapters
from tvkd_fast.scoring.cache import ScoreCache, ScoreWriter
from tvkd_fast.scoring.layout import NAMES, STATE_NAMES, ScoreLayout, Scores
from tvkd_fast.scoring.manifest import ScoreManifest
from tvkd_fast.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Scorer(Protocol):
    """Answers with the numbers of reference and teacher; None for what it has no model of."""

    def of(self, batch: PairBatch) -> Scores: ...


class RewardTeacher(nn.Module):
    """The teacher of `value_from="implicit_reward"`: what it gained over its own reference, up to every response state.

    `forward(batch)` returns Σ_{k<t} log π_φ(y_{k+1}|s_k) − log π_φref(y_{k+1}|s_k), (M,) float32, 0 at s_0, unless
    `values` is false, and the (N,) log π_φ(y_{k+1}|s_k), which are None unless `logps`.
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

    def forward(self, batch: PairBatch, *, values: bool = True, logps: bool = False) -> tuple[Tensor | None, ...]:
        own = self.teacher(batch)
        rewards = [running_sums(own - self.reference(batch), batch.cu_seqlens)] if values else []
        return *rewards, own if logps else None


Teacher = TeacherWithHead | RewardTeacher
TeacherNumbers = Literal["values", "logps"]
VALUES: tuple[TeacherNumbers, ...] = ("values",)


@dataclass(frozen=True)
class TeacherTokens:
    """A dataset in the tokens of a teacher that has a tokenizer of its own, and how many of them it takes at once."""

    dataset: PairDataset
    batching: MicroBatching


class OnlineScorer:
    """Runs the frozen models on every batch; the teacher on tokens of its own, where it is given some.

    `of_teacher` is what it is asked for: its values (sums, or rewards of a `RewardTeacher`), the responses'
    log-probabilities, or both in one pass. With `reference_states` the reference answers with its states as well, and
    `base`, the teacher's own reference, with nothing else; their heads are taken once, a collective where they are
    sharded.
    """

    def __init__(
        self,
        reference: PolicyWithHead | WithoutAdapters | None,
        teacher: Teacher | None,
        teacher_tokens: TeacherTokens | None = None,
        world: World | None = None,
        *,
        of_teacher: Collection[TeacherNumbers] = VALUES,
        reference_states: bool = False,
        base: PolicyWithHead | None = None,
    ) -> None:
        self.reference, self.teacher, self.teacher_tokens = reference, teacher, teacher_tokens
        self.world, self.of_teacher = world, of_teacher
        self.base = base
        self.ref_head = reference.head.gathered() if reference_states and reference is not None else None
        self.base_head = None if base is None else base.head.gathered()

    def names_of(self, kind: TeacherNumbers) -> tuple[str, ...]:
        """The names in `Scores` of what the teacher is asked for."""
        if kind == "logps":
            return ("teacher_logps",)
        return ("reward",) if isinstance(self.teacher, RewardTeacher) else ("lse", "lse_kappa")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the numbers that it answers with, in the order of `Scores`."""
        found = set() if self.reference is None else {"ref_logps"}
        if self.teacher is not None:
            found.update(*(self.names_of(kind) for kind in self.of_teacher))
            found.update(() if self.teacher_tokens is None else ("teacher_states", "teacher_ended"))
        return tuple(name for name in NAMES if name in found)

    def layout(self, dataset: PairDataset) -> ScoreLayout:
        """Return the layout of the numbers that it computes for a dataset."""
        return ScoreLayout.of(self._read(dataset))

    def teacher_reads(self, dataset: PairDataset) -> str | None:
        """Fingerprint of the tokens that the teacher reads of a dataset; None without a teacher."""
        return None if self.teacher is None else self._read(dataset).fingerprint

    def _read(self, dataset: PairDataset) -> PairDataset:
        return dataset if self.teacher_tokens is None else self.teacher_tokens.dataset

    @torch.no_grad()
    def of(self, batch: PairBatch) -> Scores:
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
        *found, of_tokens = self.teacher(batch, values=values, logps=logps)
        scores = Scores(**dict(zip(self.names_of("values"), found, strict=False)))
        return replace(scores, teacher_logps=segment_sums(of_tokens, batch.cu_seqlens)) if logps else scores

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
        numbers = {name: x[order if name in STATE_NAMES else layout.responses(all_pairs)] for name, x in found.items()}
        return Scores(**numbers, **{name: to_device(x, batch.labels.device) for name, x in of_responses.items()})


class CachedScorer:
    """Looks the batch's scores up in a cache."""

    def __init__(self, cache: ScoreCache) -> None:
        self.cache = cache

    def of(self, batch: PairBatch) -> Scores:
        scores = self.cache.of(batch.pairs)
        device = batch.labels.device
        return Scores(*(None if x is None else to_device(x, device) for x in vars(scores).values()))


def score_dataset(
    dataset: PairDataset,
    scorer: OnlineScorer,
    manifest: ScoreManifest,
    *,
    batching: MicroBatching,
    world: World,
    progress: bool = False,
) -> ScoreCache:
    """Run the scorer once over the dataset and keep its scores in memory, in the dataset's order.

    Each process of `world` scores its part, and each gets the scores of all.
    """
    layout = scorer.layout(dataset)
    with _bar(len(dataset), 0, progress) as bar:
        scores = _score_pairs(dataset, layout, range(len(dataset)), scorer, batching, world, bar)
    return ScoreCache(manifest, [scores], layout)


def score_to_disk(
    dataset: PairDataset,
    scorer: OnlineScorer,
    manifest: ScoreManifest,
    folder: str,
    *,
    pairs_per_shard: int,
    batching: MicroBatching,
    world: World,
    progress: bool = False,
    held: ScoreCache | None = None,
) -> ScoreCache:
    """Score the dataset shard by shard into a folder, which the first process writes.

    A rerun after a kill resumes after the last whole shard. `held`, of the first process, are scores of the same
    dataset that are written beside those of the scorer, which computes the others alone.
    """
    layout = scorer.layout(dataset)
    writer = ScoreWriter(folder, manifest, layout, dataset.pair_digests) if world.first else None
    start = world.broadcast(0 if writer is None else writer.pairs)
    with _bar(len(dataset), start, progress) as bar:
        for first in range(start, len(dataset), pairs_per_shard):
            pairs = range(first, min(first + pairs_per_shard, len(dataset)))
            scores = _score_pairs(dataset, layout, pairs, scorer, batching, world, bar)
            if writer is not None:
                writer.write(scores if held is None else _beside(held.between(pairs.start, pairs.stop), scores))
    if writer is not None:
        writer.finish()
    world.barrier()
    return ScoreCache.load(folder, dataset)


def _score_pairs(
    dataset: PairDataset,
    layout: ScoreLayout,
    pairs: range,
    scorer: OnlineScorer,
    batching: MicroBatching,
    world: World,
    bar: tqdm,
) -> Scores:
    """Return the scores of consecutive pairs, in their order."""
    kept: dict[str, Tensor] = {}
    states = layout.between(pairs.start, pairs.stop)
    batches = batching.share(dataset, pairs, rank=world.rank, size=world.size)
    for i, batch in enumerate(batches):
        scores = scorer.of(batch.to(world.device))
        of_states = layout.states(batch.pairs) - layout.bounds[2 * pairs.start]
        of_responses = layout.responses(batch.pairs) - 2 * pairs.start
        for name, numbers in vars(scores).items():
            if numbers is not None:
                x = numbers.float().cpu() if numbers.is_floating_point() else numbers.cpu()
                size, place = (states, of_states) if name in STATE_NAMES else (2 * len(pairs), of_responses)
                kept.setdefault(name, x.new_zeros(size))[place] = x
        bar.update(len(pairs) * (i + 1) // len(batches) - len(pairs) * i // len(batches))
    # Each number is in one process and 0 in the others.
    summed = {name: sum(parts[1:], start=parts[0]) for name, parts in _by_name(world.all_gather(kept)).items()}
    summed = {name: x if name in STATE_NAMES else x.view(-1, 2) for name, x in summed.items()}
    return Scores(**{name: summed.get(name) for name in NAMES})


def _beside(held: Scores, scores: Scores) -> Scores:
    """Both in one; of numbers that are in both, those that were held."""
    return replace(scores, **{name: x for name, x in vars(held).items() if x is not None})


def _by_name(found: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [of_one[name] for of_one in found] for name in found[0]}


def _bar(num_pairs: int, done: int, progress: bool) -> tqdm:
    return tqdm(total=num_pairs, initial=done, desc="scoring", unit="pair", disable=not progress)
