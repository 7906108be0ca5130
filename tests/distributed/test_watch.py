"""A process that does not come is named by those that wait, and by itself where it still can."""

import re
import sys
from pathlib import Path

import pytest

from tvkd_fast.distributed import launch
from tvkd_fast.distributed.watch import BEATS, who_is_waited_for

PROGRAM = """
import os, signal, sys, time
import torch
from tvkd_fast.distributed import init_distributed

def sleeping():
    time.sleep(60)

with init_distributed(torch.device("cpu"), timeout_s=4.0) as world:
    for _ in range(3):
        world.all_reduce(torch.ones(2))
    if world.rank == int(sys.argv[2]):
        sleeping() if sys.argv[1] == "sleep" else os.kill(os.getpid(), signal.SIGSTOP)
    world.all_reduce(torch.ones(2))
"""


def run(tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str, who: int) -> str:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    assert launch([sys.executable, "-W", "ignore", str(file), how, str(who)], 3) != 0
    return capfd.readouterr().err


@pytest.mark.distributed
@pytest.mark.parametrize("who", [0, 1])
def test_one_that_sleeps_is_named_and_says_where(who: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = run(tmp_path, capfd, "sleep", who)
    assert re.search(rf"waiting for \d+ s in collective \d+ for process {who}, behind\n", output)
    assert output.count("waiting for") == 1
    assert f"the others wait for process {who}, which has called nothing for" in output
    assert "in sleeping" in output


@pytest.mark.distributed
def test_one_that_is_stopped_is_named_by_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = run(tmp_path, capfd, "stop", 1)
    assert re.search(r"waiting for \d+ s in collective \d+ for process 1, silent\n", output)


def test_where_all_are_at_work_nobody_is_named() -> None:
    seen = {0: ("7 3", 10.0), 1: ("7 4", 10.0)}
    assert who_is_waited_for(seen, 2, 10.1, timeout_s=1.0 * BEATS) == (set(), set())
    assert who_is_waited_for(seen | {1: ("6 4", 10.0)}, 2, 10.1, timeout_s=1.0 * BEATS) == ({1}, set())
    assert who_is_waited_for(seen, 2, 15.0, timeout_s=1.0 * BEATS) == (set(), {0, 1})
    assert who_is_waited_for(seen, 3, 10.1, timeout_s=1.0 * BEATS) == (set(), {2})
