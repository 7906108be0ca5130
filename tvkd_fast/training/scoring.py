"""What reference and teacher say of a batch: from the models themselves, or from a cache of them.

Letters: P pairs, M response states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from tvkd_fast.data import PairBatch, PairDataset, ScoreCache, ScoreLayout, ScoreManifest, Scores, micro_batches
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead, TeacherWithHead


class Scorer(Protocol):
    """Answers with (2P,) reference log-probabilities and (M,) teacher sums; None for what it has no model of."""

    def of(self, batch: PairBatch) -> Scores: ...


class OnlineScorer:
    """Runs the frozen models on every batch."""

    def __init__(self, reference: PolicyWithHead | None, teacher: TeacherWithHead | None) -> None:
        self.reference, self.teacher = reference, teacher

    @torch.no_grad()
    def of(self, batch: PairBatch) -> Scores:
        ref_logps = None if self.reference is None else segment_sums(self.reference(batch), batch.cu_seqlens)
        lse, lse_kappa = (None, None) if self.teacher is None else self.teacher(batch)
        return Scores(ref_logps, lse, lse_kappa)


class CachedScorer:
    """Looks the batch up."""

    def __init__(self, cache: ScoreCache) -> None:
        self.cache = cache

    def of(self, batch: PairBatch) -> Scores:
        scores = self.cache.of(batch.pairs)
        device = batch.labels.device
        return Scores(*(None if x is None else x.to(device) for x in (scores.ref_logps, scores.lse, scores.lse_kappa)))


def score_dataset(
    dataset: PairDataset,
    scorer: Scorer,
    manifest: ScoreManifest,
    *,
    pairs_per_micro_batch: int,
    device: torch.device,
    progress: bool = False,
) -> ScoreCache:
    """Run the scorer once over the dataset and keep what it says, in the dataset's order."""
    layout = ScoreLayout(dataset)
    kept: dict[str, Tensor] = {}
    batches = micro_batches(dataset, range(len(dataset)), size=pairs_per_micro_batch)
    for batch in _with_progress(batches, len(dataset), progress):
        scores = scorer.of(batch.to(device))
        places = {"ref_logps": layout.responses(batch.pairs)}
        places["lse"] = places["lse_kappa"] = layout.states(batch.pairs)
        for name, place in places.items():
            numbers = getattr(scores, name)
            if numbers is not None:
                size = 2 * layout.num_pairs if name == "ref_logps" else layout.num_states
                kept.setdefault(name, torch.zeros(size))[place] = numbers.float().cpu()
    ref_logps = kept["ref_logps"].view(-1, 2) if "ref_logps" in kept else None
    return ScoreCache(manifest, Scores(ref_logps, kept.get("lse"), kept.get("lse_kappa")), layout)


def _with_progress(batches: Iterable[PairBatch], num_pairs: int, progress: bool) -> Iterator[PairBatch]:
    from tqdm import tqdm

    with tqdm(total=num_pairs, desc="scoring", unit="pair", disable=not progress) as bar:
        for batch in batches:
            yield batch
            bar.update(batch.num_pairs)
