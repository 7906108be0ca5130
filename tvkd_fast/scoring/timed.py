"""The time that scoring takes."""

from __future__ import annotations

import time

import torch

from tvkd_fast.data.batch import PairBatch
from tvkd_fast.scoring.layout import Scores
from tvkd_fast.scoring.scorer import Scorer


class TimedScorer:
    """A scorer that counts its seconds: a GPU's own by events, which nobody waits for until they are asked for."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.seconds = scorer, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def of(self, batch: PairBatch) -> Scores:
        if batch.labels.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            scores = self.scorer.of(batch)
            end.record()
            self._events.append((start, end))
            return scores
        began = time.perf_counter()
        scores = self.scorer.of(batch)
        self.seconds += time.perf_counter() - began
        return scores

    def take(self) -> float:
        """The seconds since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
            self.seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1e3
            self._events.clear()
        taken, self.seconds = self.seconds, 0.0
        return taken
