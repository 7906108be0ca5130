"""The seven steps and the seconds that each may take; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WHOLE = 535.0
"""Seconds of the whole walk: 540, less what it takes to end processes and to write the report."""
DRY_WHOLE = 300.0
"""The same of a dry walk, which takes a quarter of it on two idle cores."""


@dataclass(frozen=True, kw_only=True)
class Step:
    name: str
    """Of its module, `bench.minutes.NAME`, unless `module` says otherwise."""
    title: str
    seconds: float
    dry_seconds: float = 30.0
    jobs: int = 1
    """Processes at once: one where times are taken, more where kernels compile."""
    checks: bool = True
    """Whether it looks for mistakes: a case that was left out then counts as one that failed."""
    module: str | None = None

    @property
    def path(self) -> str:
        return self.module or f"bench.minutes.{self.name}"


STEPS = (
    Step(name="machine", title="versions, power, memory, the link to the kernels", seconds=10),
    Step(
        name="alone",
        title="every kernel alone, between guards",
        seconds=30,
        jobs=12,
        dry_seconds=45,
        module="bench.minutes.alone.kernels",
    ),
    Step(name="suites", title="the kernels' own tests", seconds=120, dry_seconds=60),
    Step(name="numbers", title="numbers beside float64", seconds=60, jobs=8, dry_seconds=45),
    Step(name="speed", title="each kernel beside cuBLAS", seconds=100, checks=False),
    Step(name="whole", title="the whole head beside its peers", seconds=155, checks=False),
    Step(name="training", title="a whole training step", seconds=60, checks=False),
)


def deadlines(steps: Sequence[Step], begin: float, whole: float, *, dry: bool) -> list[float]:
    """When each step is cut off, from when the walk begins: what earlier steps leave is its own, and later ones keep
    all of theirs."""
    seconds = [step.dry_seconds if dry else step.seconds for step in steps]
    return [begin + whole - sum(seconds[i + 1 :]) for i in range(len(steps))]
