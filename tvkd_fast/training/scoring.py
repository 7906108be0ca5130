"""What reference and teacher say of a batch: from the models themselves, or from a cache of them.

Letters: P pairs, M response states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvkd_fast.data import (
    MicroBatching,
    PairBatch,
    PairDataset,
    ScoreCache,
    ScoreLayout,
    ScoreManifest,
    Scores,
    ScoreWriter,
)
from tvkd_fast.data.scores import STATE_NAMES
from tvkd_fast.losses import running_sums, segment_sums
from tvkd_fast.models import PolicyWithHead, TeacherWithHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Scorer(Protocol):
    """Answers with (2P,) reference log-probabilities and (M,) teacher sums; None for what it has no model of."""

    def of(self, batch: PairBatch) -> Scores: ...


class RewardTeacher(nn.Module):
    """The teacher of `value_from="implicit_reward"`: what it gained over its own reference, up to every response state.

    `forward(batch)` returns Σ_{k<t} log π_φ(y_{k+1}|s_k) − log π_φref(y_{k+1}|s_k), (M,) float32; 0 at s_0.
    """

    def __init__(self, teacher: PolicyWithHead, reference: PolicyWithHead) -> None:
        super().__init__()
        self.teacher, self.reference = teacher, reference

    @property
    def model(self) -> PreTrainedModel:
        return self.teacher.model

    def forward(self, batch: PairBatch) -> Tensor:
        return running_sums(self.teacher(batch) - self.reference(batch), batch.cu_seqlens)


class OnlineScorer:
    """Runs the frozen models on every batch."""

    def __init__(self, reference: PolicyWithHead | None, teacher: TeacherWithHead | RewardTeacher | None) -> None:
        self.reference, self.teacher = reference, teacher

    @torch.no_grad()
    def of(self, batch: PairBatch) -> Scores:
        ref_logps = None if self.reference is None else segment_sums(self.reference(batch), batch.cu_seqlens)
        if isinstance(self.teacher, RewardTeacher):
            return Scores(ref_logps, None, None, self.teacher(batch))
        lse, lse_kappa = (None, None) if self.teacher is None else self.teacher(batch)
        return Scores(ref_logps, lse, lse_kappa)


class CachedScorer:
    """Looks the batch up."""

    def __init__(self, cache: ScoreCache) -> None:
        self.cache = cache

    def of(self, batch: PairBatch) -> Scores:
        scores = self.cache.of(batch.pairs)
        device = batch.labels.device
        return Scores(*(None if x is None else x.to(device) for x in vars(scores).values()))


def score_dataset(
    dataset: PairDataset,
    scorer: Scorer,
    manifest: ScoreManifest,
    *,
    batching: MicroBatching,
    device: torch.device,
    progress: bool = False,
) -> ScoreCache:
    """Run the scorer once over the dataset and keep what it says in memory, in the dataset's order."""
    layout = ScoreLayout(dataset)
    with _bar(len(dataset), 0, progress) as bar:
        scores = _score_pairs(dataset, layout, range(len(dataset)), scorer, batching, device, bar)
    return ScoreCache(manifest, [scores], layout)


def score_to_disk(
    dataset: PairDataset,
    scorer: Scorer,
    manifest: ScoreManifest,
    folder: str,
    *,
    pairs_per_shard: int,
    batching: MicroBatching,
    device: torch.device,
    progress: bool = False,
) -> ScoreCache:
    """The same shard by shard into a folder. Killed, it goes on after the last whole shard when it is run again."""
    layout = ScoreLayout(dataset)
    writer = ScoreWriter(folder, manifest, layout)
    with _bar(len(dataset), writer.pairs, progress) as bar:
        while writer.pairs < len(dataset):
            pairs = range(writer.pairs, min(writer.pairs + pairs_per_shard, len(dataset)))
            writer.write(_score_pairs(dataset, layout, pairs, scorer, batching, device, bar))
    writer.finish()
    return ScoreCache.load(folder, dataset)


def _score_pairs(
    dataset: PairDataset,
    layout: ScoreLayout,
    pairs: range,
    scorer: Scorer,
    batching: MicroBatching,
    device: torch.device,
    bar: tqdm,
) -> Scores:
    """What the scorer says of consecutive pairs, in their order."""
    kept: dict[str, Tensor] = {}
    states = layout.between(pairs.start, pairs.stop)
    for batch in batching.batches(dataset, pairs):
        scores = scorer.of(batch.to(device))
        of_states = layout.states(batch.pairs) - layout.bounds[2 * pairs.start]
        of_responses = layout.responses(batch.pairs) - 2 * pairs.start
        for name, numbers in vars(scores).items():
            if numbers is not None:
                size, place = (2 * len(pairs), of_responses) if name == "ref_logps" else (states, of_states)
                kept.setdefault(name, torch.zeros(size))[place] = numbers.float().cpu()
        bar.update(batch.num_pairs)
    return Scores(kept.pop("ref_logps").view(-1, 2), **{name: kept.get(name) for name in STATE_NAMES})


def _bar(num_pairs: int, done: int, progress: bool) -> tqdm:
    return tqdm(total=num_pairs, initial=done, desc="scoring", unit="pair", disable=not progress)
