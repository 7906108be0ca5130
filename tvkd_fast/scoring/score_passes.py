"""A scorer's pass over a dataset: into memory, or shard by shard into a folder.

Letters: P pairs, M response states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise, starmap
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from tvkd_fast.data import MicroBatching, PairDataset
from tvkd_fast.distributed import World
from tvkd_fast.files import unfinished
from tvkd_fast.scoring.cache import ScoreCache, ScoreWriter
from tvkd_fast.scoring.kinds import token_kinds
from tvkd_fast.scoring.layout import NAMES, STATE_NAMES, ScoreLayout, Scores
from tvkd_fast.scoring.manifest import Part, ScoreManifest
from tvkd_fast.scoring.rotation import Rotation
from tvkd_fast.scoring.scorer import OnlineScorer
from tvkd_fast.scoring.token_codec import Codec, Rows, codec_of
from tvkd_fast.scoring.token_files import link_parts, write_head


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
