"""The time that scoring takes."""

from __future__ import annotations

import time

import torch

from tvkd_fast.data.batch import PairBatch
from tvkd_fast.scoring.layout import Scores
from tvkd_fast.scoring.scorer import Scorer


class TimedScorer:
    """A scorer that counts its seconds, and waits for a GPU to do so."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.seconds = scorer, 0.0

    def of(self, batch: PairBatch) -> Scores:
        _wait(batch)
        start = time.perf_counter()
        scores = self.scorer.of(batch)
        _wait(batch)
        self.seconds += time.perf_counter() - start
        return scores

    def take(self) -> float:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, 0.0
        return taken


def _wait(batch: PairBatch) -> None:
    if batch.labels.is_cuda:
        torch.cuda.synchronize(batch.labels.device)
