"""How a GPU is timed, by a device that only counts; and in which order and surroundings the ten minutes do it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.harness import meters
from bench.minutes import walk, whole
from bench.minutes.cases import Scale


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the device, in order."""
    found: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            found.append("event")

        def synchronize(self) -> None:
            found.append("wait")

        def elapsed_time(self, other: Any) -> float:
            return 2.0

    def empty(size: int, *, dtype: torch.dtype, device: str) -> SimpleNamespace:
        assert size * dtype.itemsize >= 2**28
        return SimpleNamespace(zero_=lambda: found.append(f"write on {device}"))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.append("wait"))
    monkeypatch.setattr(torch, "empty", empty)
    return found


def test_a_call_is_timed_behind_a_flushed_cache(happened: list[str]) -> None:
    job = meters.GpuMeter().start(lambda: lambda: happened.append("call"), lambda x: x)
    assert job.seconds() == 2e-3
    assert happened == ["write on cuda", "event", "call", "event", "wait"]


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 3), (0.025, 5)])
def test_warm_up_takes_calls_and_time(
    happened: list[str], monkeypatch: pytest.MonkeyPatch, seconds: float, calls: int
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 100))
    monkeypatch.setattr(meters.GpuJob, "WARM_UP_SECONDS", seconds)
    meters.GpuMeter().start(lambda: lambda: happened.append("call"), lambda x: x).warm_up()
    assert happened == ["call", "wait"] * calls


def test_what_is_compiled_comes_last() -> None:
    compiled = [whole.COMPILED in case.name for case in whole.cases(Scale(dry=False))]
    assert sorted(compiled) == compiled
    assert 0 < sum(compiled) < len(compiled)


def test_no_image_turns_float32_into_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in walk.TF32:
        monkeypatch.setenv(name, "1")
    assert walk.environment(False).keys().isdisjoint(walk.TF32)
