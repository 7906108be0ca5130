"""Tiles that were timed: what is kept, under which key, and who reads it. The timer is the test's own."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import triton

from tvkd_fast.kernels import autotune
from tvkd_fast.kernels.autotune import CANDIDATES
from tvkd_fast.kernels.configs import Demand, TileConfig, choose

A = TileConfig(64, 64, 32, warps=4, stages=2)
B = TileConfig(128, 64, 32, warps=4, stages=2)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TVKD_FAST_TUNING", str(tmp_path / "deep" / "tuning.json"))
    autotune._tuned.cache_clear()
    yield autotune.cache_file()
    autotune._tuned.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that say they are on an H100."""
    monkeypatch.setattr(autotune, "target_of", lambda tensor: "sm_90")


def operands(n: int = 100, d: int = 64, v: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n, d), torch.zeros(v, d)


def test_the_fastest_wins() -> None:
    times = {A: 2.0, B: 1.0}
    assert autotune.fastest((A, B), times.__getitem__) == B


@pytest.mark.parametrize("error", [triton.OutOfResources(300, 200, "shared memory"), RuntimeError("no kernel image")])
def test_a_candidate_that_the_device_cannot_hold_is_passed_over(error: Exception) -> None:
    def seconds(config: TileConfig) -> float:
        if config == B:
            raise error
        return 1.0

    assert autotune.fastest((A, B), seconds) == A
    with pytest.raises(ValueError, match="take impl='torch' meanwhile"):
        autotune.fastest((B,), seconds)


def test_what_was_remembered_is_taken(file: Path, hopper: None) -> None:
    hidden, weight = operands()
    before = autotune.tiles("head_stats", hidden, weight, 100)
    name = autotune.key("head_stats", hidden, Demand(wide=True), (100, 64, 1000))
    autotune.remember({name: A}, file)
    assert before != A
    assert autotune.tiles("head_stats", hidden, weight, 100) == A
    assert autotune.tiles("head_stats", hidden, weight, 100, heavy=True) != A
    assert autotune.tiles("dlogits", hidden, weight, 100) != A


def rows_of_a_buffer(columns: int, stride: int, start: int) -> torch.Tensor:
    """[8, columns] float16 that lies in a longer buffer: rows `stride` apart, the first at number `start`."""
    return torch.zeros(8 * stride + start, dtype=torch.float16)[start:].as_strided((8, columns), (stride, 1))


@pytest.mark.parametrize(
    ("columns", "stride", "start", "aligned"),
    [
        (48, 48, 0, True),
        (48, 64, 16, True),
        (40, 40, 0, False),
        (40, 48, 0, False),
        (48, 56, 0, False),
        (48, 48, 1, False),
    ],
)
def test_rows_that_the_compiler_may_take_as_aligned(
    file: Path, hopper: None, columns: int, stride: int, start: int, aligned: bool
) -> None:
    """Multiples of 16 numbers: rows of 80 bytes begin at multiples of 16 bytes too, and no compiler hears of it."""
    hidden, weight = torch.zeros(8, columns, dtype=torch.float16), rows_of_a_buffer(columns, stride, start)
    assert autotune.tiles("product", hidden, weight, 8) == choose("product", "sm_90", Demand(aligned=aligned))


def test_a_bucket_is_shared_and_its_neighbour_is_not(file: Path, hopper: None) -> None:
    hidden, weight = operands()
    autotune.remember({autotune.key("product", hidden, Demand(wide=True), (100, 64, 1000)): A}, file)
    assert all(autotune.tiles("product", hidden, weight, rows) == A for rows in (65, 100, 128))
    assert all(autotune.tiles("product", hidden, weight, rows) != A for rows in (64, 129))


def test_entries_add_up_and_nothing_half_written_stays(file: Path) -> None:
    autotune.remember({"one": A}, file)
    autotune.remember({"two": B}, file)
    assert json.loads(file.read_text()) == {"one": asdict(A), "two": asdict(B)}
    assert [x.name for x in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "text", ['{"one": {"block_m"', '{"one": {"block_q": 1}}', "[1]"], ids=["torn", "foreign", "list"]
)
def test_a_file_of_another_kind_is_passed_over(file: Path, hopper: None, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)
    hidden, weight = operands()
    with pytest.warns(UserWarning, match="is passed over"):
        assert autotune.tiles("product", hidden, weight, 100) == choose("product", "sm_90", Demand(wide=True))


def test_every_kernel_is_tuned(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches themselves, in the interpreter: each candidate's call is made once."""
    few = (TileConfig(32, 64, 32, warps=4, stages=1), TileConfig(64, 32, 32, warps=4, stages=1))
    monkeypatch.setattr(autotune, "CANDIDATES", few)
    calls = []

    def seconds(run: Callable[[], object]) -> float:
        run()
        calls.append(run)
        return float(len(calls) % 2)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = autotune.tune((40, 32, 90), torch.float32, device, seconds)
    assert [name.split("|")[0] for name in found] == [
        "head_stats",
        "selection_bits",
        "exponentials",
        "dlogits",
        "product",
        "joint_stats",
        "joint_values",
        "joint_dlogits",
    ]
    assert len(calls) == 16
    assert set(found.values()) == {few[1]}


def test_candidates_keep_what_the_walk_relies_on() -> None:
    """A product reads whole steps of its inner dimension from tiles that dlogits wrote."""
    steps = {config.block_k for config in CANDIDATES}
    assert all(config.block_m % step == 0 == config.block_n % step for config in CANDIDATES for step in steps)
    assert max(max(config.block_m, config.block_n) for config in CANDIDATES) <= autotune.TILE_MAX
