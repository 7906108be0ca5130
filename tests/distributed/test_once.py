"""A refusal of several processes is printed by one of them."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tvkd_fast.cli.main import main
from tvkd_fast.distributed import once, print_once


@pytest.fixture
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", str(store.port))):
        monkeypatch.setenv(name, value)
    yield
    del store


@pytest.mark.usefixtures("_two_processes")
def test_the_first_that_has_something_to_print_prints_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments, wanted in (
        (["train", "--policy", str(tmp_path / "none"), "--output_dir", str(tmp_path)], "tvkd needs a teacher"),
        (["train", "--policy", "p", "--output_dir", "o", "--max-steps", "2"], "Did you mean --max_steps?"),
        (["scores", str(tmp_path / "none")], "no score cache at"),
        (["train", "--config", "no_recipe"], "no recipe or file"),
    ):
        output = []
        for rank in ("1", "0"):
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == 2
            output.append(capsys.readouterr().err)
        assert wanted in output[0]
        assert output[1] == ""


@pytest.mark.usefixtures("_two_processes")
def test_what_differs_is_printed_by_each(capsys: pytest.CaptureFixture[str]) -> None:
    print_once("one")
    print_once("other")
    assert capsys.readouterr().err == "one\nother\n"


def test_without_a_place_to_meet_each_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    print_once("alone")
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(once, "STORE_TIMEOUT", once.STORE_TIMEOUT / 10)
    start = time.monotonic()
    print_once("nobody there")
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err == "alone\nnobody there\n"
