"""The contenders of `tvkd bench head` and `values` under pytest-benchmark, in one process.

    python -m pytest bench/head --benchmark-autosave [--benchmark-compare]

For comparing a change with the state before it, which is what pytest-benchmark keeps records for; TVKD_BENCH_SHAPE
names tokens x hidden x vocabulary. Figures beside peers, with their memory, are `tvkd bench`'s.
"""

import os
from typing import Any

import pytest
import torch

from bench.harness.reference import HeadReference, compute
from bench.harness.states import States, made_states
from bench.head.comparison import call, check
from bench.head.contenders import Contender, of_values, on_cpu

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'tvkd_fast[bench]'")

SHAPE = tuple(int(x) for x in os.environ.get("TVKD_BENCH_SHAPE", "256x64x8192").split("x"))
CONTENDERS = {**on_cpu(), **{f"values, {name}": x for name, x in of_values().items()}}


@pytest.fixture(scope="module")
def case() -> tuple[States, HeadReference]:
    n, d, v = SHAPE
    with torch.no_grad():
        states = made_states((n, d, v), entries=100.0)
        return states, compute(states)


def takes_part(name: str) -> bool:
    # Without numba it stays for the process, and memory that was touched before is the allocator's doing.
    if "without numba" in name or "touched" in name:
        return False
    return not CONTENDERS[name].refusal and not CONTENDERS[name].by_name


@pytest.mark.parametrize("name", [name for name in CONTENDERS if takes_part(name)])
def test_head(benchmark: Any, case: tuple[States, HeadReference], name: str) -> None:
    contender: Contender = CONTENDERS[name]
    run = call(contender, case[0])
    row = check(contender, *case, run())
    assert "wrong" not in row, row
    benchmark(run)
