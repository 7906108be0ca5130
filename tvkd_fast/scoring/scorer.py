"""The scores of reference and teacher for a batch: from the models themselves, or from a cache.

Letters: P pairs, M response states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvkd_fast.data import MicroBatching, PairBatch, PairDataset
from tvkd_fast.distributed import World
from tvkd_fast.files import unfinished
from tvkd_fast.losses import running_sums, segment_sums
from tvkd_fast.models import FusedLMHead, PolicyWithHead, TeacherWithHead, WithoutAdapters
from tvkd_fast.scoring.cache import ScoreCache, ScoreWriter
from tvkd_fast.scoring.distributions import kept_of
from tvkd_fast.scoring.kinds import TOKEN_KINDS, VALUES, kind_of, token_kinds
from tvkd_fast.scoring.layout import NAMES, STATE_NAMES, ScoreLayout, Scores, in_order
from tvkd_fast.scoring.manifest import Part, ScoreManifest
from tvkd_fast.scoring.rotation import Rotation
from tvkd_fast.scoring.token_codec import Codec, Rows, codec_of
from tvkd_fast.scoring.token_files import link_parts, write_head
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

    Each process of `world` scores its part, and each gets the scores of all. Nothing of single tokens is kept so.
    """
    assert not token_kinds(scorer.of_teacher), "a dataset's distributions are for a disk"
    layout = scorer.layout(dataset)
    with _bar(len(dataset), 0, progress) as bar:
        scores, _ = _score_pairs(dataset, layout, range(len(dataset)), scorer, {}, batching, world, bar)
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

    A rerun after a kill resumes after the last whole shard, whatever the size of the next. `held`, of the first
    process, are scores of the same dataset that are written beside the scorer's, which computes the others alone.
    """
    layout = scorer.layout(dataset)
    codecs, head = _codecs(scorer, manifest)
    if held is not None and held.manifest.head is not None:
        of_held = held.manifest.head
        head = lambda into: link_parts(Path(folder), into, [of_held])[0]  # noqa: E731
    writer = ScoreWriter(folder, manifest, layout, dataset.pair_digests, head) if world.first else None
    # What is held of tokens stays in its files, and so their pairs stay together.
    grid = [shard.pairs for shard in held.manifest.shards] if held is not None and held.tokens is not None else None
    grid, done = world.broadcast((grid, [] if writer is None else [shard.pairs for shard in writer.manifest.shards]))
    if grid is not None and grid[: len(done)] != done:
        partial = unfinished(Path(folder))
        raise ValueError(f"{partial} has shards of other sizes than {folder}: delete it and score again")
    with _bar(len(dataset), sum(done), progress) as bar:
        for pairs in _shards(len(dataset), sum(done), pairs_per_shard, grid):
            scores, tokens = _score_pairs(dataset, layout, pairs, scorer, codecs, batching, world, bar)
            if writer is None:
                continue
            assert pairs.start == writer.pairs
            beside = held.manifest.shards[len(writer.manifest.shards)].beside if held and grid else None
            if held is not None:
                scores = _beside(held.between(pairs.start, pairs.stop), scores)
            writer.write(scores, tokens, None if beside is None else (Path(folder), beside))
    if writer is not None:
        writer.finish()
    world.barrier()
    return ScoreCache.load(folder, dataset)


def _shards(count: int, start: int, size: int, grid: list[int] | None) -> Iterator[range]:
    """The pairs of each shard from `start` on: up to the ends of `grid`, or `size` of them."""
    ends = accumulate(grid) if grid else (min(end, count) for end in range(start + size, count + size, size))
    return starmap(range, pairwise([start, *(end for end in ends if end > start)]))


def _codecs(scorer: OnlineScorer, manifest: ScoreManifest) -> tuple[dict[str, Codec], Callable[[Path], Part] | None]:
    """The codecs of what the scorer keeps of tokens, and the writer of the head of its states."""
    kinds, head = token_kinds(scorer.of_teacher), scorer.teacher_head
    if scorer.teacher is None or not kinds:
        return {}, None
    rotation = None
    if head is not None and manifest.rotation is not None:
        rotation = Rotation.seeded(head.weight.shape[1], manifest.rotation)
    size = scorer.teacher.policies[0].vocab_size
    codecs = {name: codec_of(name, manifest.states_dtype, size, rotation) for name in kinds}
    if "states" not in kinds or head is None:
        return codecs, None
    return codecs, lambda into: write_head(into, head if rotation is None else rotation.folded(head))


def _score_pairs(
    dataset: PairDataset,
    layout: ScoreLayout,
    pairs: range,
    scorer: OnlineScorer,
    codecs: Mapping[str, Codec],
    batching: MicroBatching,
    world: World,
    bar: tqdm,
) -> tuple[Scores, dict[str, tuple[Codec, Rows]]]:
    """Return the numbers of consecutive pairs, in their order, and in the first process their tokens' rows by kind."""
    kept: dict[str, Tensor] = {}
    coded: dict[str, list[Rows]] = {name: [] for name in codecs}
    places: list[Tensor] = []
    states = layout.between(pairs.start, pairs.stop)
    batches = batching.share(dataset, pairs, rank=world.rank, size=world.size)
    for i, batch in enumerate(batches):
        scores = scorer.of(batch.to(world.device))
        of_states = layout.states(batch.pairs) - layout.bounds[2 * pairs.start]
        of_responses = layout.responses(batch.pairs) - 2 * pairs.start
        for name in NAMES:
            numbers = getattr(scores, name)
            if numbers is not None:
                x = numbers.float().cpu() if numbers.is_floating_point() else numbers.cpu()
                size, place = (states, of_states) if name in STATE_NAMES else (2 * len(pairs), of_responses)
                kept.setdefault(name, x.new_zeros(size))[place] = x
        if codecs and batch.num_pairs:
            places.append(layout.tokens(batch.pairs) - int(layout.bounds[2 * pairs.start]) + 2 * pairs.start)
            for name, codec in codecs.items():
                coded[name].append({key: x.cpu() for key, x in codec.encode(scores).items()})
        bar.update(len(pairs) * (i + 1) // len(batches) - len(pairs) * i // len(batches))
    # Each number is in one process and 0 in the others.
    summed: dict[str, Any] = {
        name: sum(parts[1:], start=parts[0]) for name, parts in _by_name(world.all_gather(kept)).items()
    }
    summed = {name: x if name in STATE_NAMES else x.view(-1, 2) for name, x in summed.items()}
    numbers = Scores(**{name: summed.get(name) for name in NAMES})
    # Rows of tokens are many: only the process that writes them gets them, one kind after the other.
    order = world.gather(places) if codecs else []
    return numbers, {name: (codec, _in_order(world.gather(coded[name]), order)) for name, codec in codecs.items()}


def _in_order(found: list[list[Rows]], places: list[list[Tensor]]) -> Rows:
    """Rows of all batches of all processes, each in its place; nothing where nothing was gathered."""
    batches = [x for of_one in zip(found, places, strict=True) for x in zip(*of_one, strict=True)]
    count = sum(len(place) for _, place in batches)
    ordered: dict[str, Tensor] = {}
    for rows, place in batches:
        for name, x in rows.items():
            ordered.setdefault(name, x.new_empty((count, *x.shape[1:])))[place] = x
    return ordered


def _beside(held: Scores, scores: Scores) -> Scores:
    """Both in one; of numbers that are in both, those that were held."""
    return replace(scores, **{name: x for name, x in vars(held).items() if x is not None})


def _by_name(found: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [of_one[name] for of_one in found] for name in found[0]}


def _bar(num_pairs: int, done: int, progress: bool) -> tqdm:
    return tqdm(total=num_pairs, initial=done, desc="scoring", unit="pair", disable=not progress)
