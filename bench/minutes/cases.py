"""What a step is made of: cases, each of which leaves one row or several.

A row is a dict of JSON with a `name`. Where there is nothing to show, one of these says why:

    skipped   it could not be tried here: it takes a GPU, or a package that is missing
    failed    what it raised, or how its process ended
    wrong     which of its numbers are off
    cut       it was under way when its step was out of time
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch

from bench.harness.checker import checked

Row = dict[str, Any]
T = TypeVar("T")

LIMIT = 25.0
"""Seconds that a case may take, with all that it compiles."""


class NotTriedError(Exception):
    """Raised by a case that cannot be tried here; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    run: Callable[[], Row | Iterable[Row]]
    limit: float = LIMIT
    peer: bool = False
    """Another library's: what it refuses or gets wrong is no mistake of ours."""


@dataclass(frozen=True)
class Scale:
    """Where the walk runs: on a GPU, or dry, in Triton's interpreter on a CPU with tiny shapes and without times."""

    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Triton's interpreter multiplies bfloat16's bit patterns, hence none dry."""
        kept = (torch.float16, torch.float32)
        return kept if self.dry else (torch.bfloat16, *kept)

    def of(self, full: T, tiny: T) -> T:
        return tiny if self.dry else full

    def needs_gpu(self) -> None:
        """Raise NotTriedError where there is none, or the walk is dry."""
        if self.dry or not torch.cuda.is_available():
            raise NotTriedError("needs a GPU")

    def milliseconds(self, runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        """Medians of runs taken in turns after warm-up, by CUDA events. Dry, each is run once and has no time."""
        if self.dry:
            for run in runs.values():
                run()
            return {}
        from bench.harness.meters import GpuMeter, interleaved

        jobs = {name: GpuMeter().start(partial(_itself, run), _itself) for name, run in runs.items()}
        for job in jobs.values():
            job.warm_up()
        taken = interleaved({name: job.seconds for name, job in jobs.items()}, rounds)
        return {name: 1e3 * median(own for _, own in times) for name, times in taken.items()}


def _itself(x: T) -> T:
    return x


def short(dtype: torch.dtype) -> str:
    """bf16, fp16 or fp32."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def judged(errors: Mapping[str, float], limits: Mapping[str, float] | float) -> Row:
    """`checked` of errors whose limits may be one number for all."""
    return checked(errors, dict.fromkeys(errors, limits) if isinstance(limits, float | int) else limits)
