"""The time that scoring takes, and that nobody waits for a GPU to know it."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tvkd_fast.scoring import Scores
from tvkd_fast.scoring.timed import TimedScorer


class Slow:
    def of(self, batch: Any) -> Scores:
        time.sleep(0.02)
        return Scores()


def batch(*, cuda: bool) -> Any:
    return SimpleNamespace(labels=SimpleNamespace(is_cuda=cuda, device="cuda"))


def test_seconds_are_those_since_the_last_call() -> None:
    scorer = TimedScorer(Slow())
    for _ in range(2):
        scorer.of(batch(cuda=False))
    assert 0.04 <= scorer.take() < 5
    assert scorer.take() == 0


def test_a_gpu_is_not_waited_for_until_the_seconds_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        made = 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.number = Event.made
            Event.made += 1

        def record(self) -> None:
            log.append(f"record {self.number}")

        def synchronize(self) -> None:
            log.append(f"wait {self.number}")

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.number - self.number + self.number / 10)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("wait for all"))
    scorer = TimedScorer(Slow())
    for _ in range(2):
        scorer.of(batch(cuda=True))
    assert log == [f"record {i}" for i in range(4)]
    # 1 s, and 1.2 s.
    assert scorer.take() == pytest.approx(2.2)
    assert log[4:] == ["wait 3"]
    assert scorer.take() == 0
