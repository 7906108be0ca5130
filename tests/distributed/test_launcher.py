"""The processes of `tvkd train --nproc`: their meeting, the message when one dies, and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tvkd_fast.distributed import launch

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
rank, folder, what = os.environ["RANK"], Path(sys.argv[1]), sys.argv[2]
if what == "listen":
    heard = []
    def hear(*_):
        heard.append(1)
        (folder / f"{rank}-heard").write_text(str(len(heard)))
    signal.signal(signal.SIGTERM, hear)
(folder / f"{rank}").write_text(str(os.getpid()))
if what == "fail" and rank == "1":
    raise RuntimeError("the second one fails")
if what == "die" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "meet":
    import torch
    from tvkd_fast.distributed import init_distributed
    with init_distributed(torch.device("cpu")) as world:
        found = f"{world.all_gather(world.rank)} {world.all_reduce_max(world.rank)} {world.broadcast(world.rank)}"
        listening = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}")]
        port = format(int(os.environ["MASTER_PORT"]), "04X")
        at = sorted({f[1] for f in listening if f[1].endswith(":" + port) and f[3] == "0A"})
        # In one piece: others write too.
        os.write(1, f"{found}\\nat {at}\\n".encode())
elif what == "listen":
    while not heard:
        time.sleep(0.01)
    time.sleep(0.5)
    sys.exit(143)
elif what != "pass":
    time.sleep(60)
"""
STARTER = "import sys; from tvkd_fast.distributed import launch; sys.exit(launch(sys.argv[2:], int(sys.argv[1])))"


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return [sys.executable, "-W", "ignore", str(file), str(tmp_path)]


@pytest.mark.distributed
def test_processes_meet_on_the_loopback_interface_alone(program: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch([*program, "meet"], 3) == 0
    output = capfd.readouterr().out.splitlines()
    assert output.count("[0, 1, 2] 2 0") == 3
    # 127.0.0.1 as the kernel writes it, and neither 0.0.0.0 nor ::.
    places = [line for line in output if line.startswith("at")]
    assert all("'0100007F:" in line and line.count(":") == 1 for line in places), places


@pytest.fixture
def _little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the grace period: the remaining processes sleep through it."""
    monkeypatch.setattr("tvkd_fast.distributed.launcher.GRACE_S", 0.5)


def test_all_that_pass_pass(program: list[str]) -> None:
    assert launch([*program, "pass"], 2) == 0


@pytest.mark.usefixtures("_little_grace")
def test_one_that_raises_takes_the_others_down(program: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert launch([*program, "fail"], 3) == 1
    assert time.monotonic() - start < 30
    assert "RuntimeError: the second one fails" in capfd.readouterr().err


@pytest.mark.usefixtures("_little_grace")
def test_one_that_is_killed_is_named(program: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch([*program, "die"], 2) == 128 + signal.SIGKILL
    assert "process 1 of 2 was killed by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("to_all", [False, True], ids=["the launcher", "as a terminal does"])
def test_a_signal_is_handed_on_once(to_all: bool, program: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", STARTER, "2", *program, "listen"]
    started = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while not all((tmp_path / rank).exists() for rank in "01") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    if to_all:
        os.killpg(started.pid, signal.SIGTERM)
    else:
        started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=30) == 143
    assert [(tmp_path / f"{rank}-heard").read_text() for rank in "01"] == ["1", "1"]
