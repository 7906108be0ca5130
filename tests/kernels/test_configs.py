"""The table of tiles: one row for every demand, none that no demand reaches, and the census that each row cites."""

import json
import math
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from bench.census.binaries import Build, builds
from tvkd_fast.kernels import launch, releases
from tvkd_fast.kernels.configs import (
    OLDER,
    TABLE,
    TARGETS,
    Demand,
    Kernel,
    Row,
    row_of,
)
from tvkd_fast.kernels.gathers import GATHERED_FLOATS, GatherConfig
from tvkd_fast.kernels.releases import CENSUS_RELEASE, Release

CENSUS = Path(__file__).parents[2] / "bench" / "results" / "census.json"
FAMILIES = {target: target for target in TARGETS} | {"sm_89": "sm_86", "sm_120": "sm_86"}
DEMANDS = [Demand(*flags) for flags in product((False, True), repeat=4)]


def reached(release: Release) -> set[Row]:
    return {row_of(*case, release) for case in product(get_args(Kernel), TARGETS, DEMANDS)}


def test_every_demand_has_one_row_and_every_row_a_demand() -> None:
    assert len({(row.kernel, row.target, row.shape) for row in TABLE}) == len(TABLE)
    assert reached(CENSUS_RELEASE) == set(TABLE)
    assert reached((9, 0)) == set(TABLE)


@pytest.mark.parametrize("release", OLDER)
def test_an_older_triton_takes_tiles_that_it_holds(release: Release) -> None:
    """Its own rows: some demand reaches each, none under the census's release; and none is larger than the table's."""
    assert release < CENSUS_RELEASE
    assert set(OLDER[release]) <= reached(release)
    assert not set(OLDER[release]) & reached(CENSUS_RELEASE)
    for row in OLDER[release]:
        (demand,) = [x for x in DEMANDS if x.names == set(row.shape.split()) - {"plain"}]
        then, now = (row_of(row.kernel, row.target, demand, x).tiles for x in (release, CENSUS_RELEASE))
        assert then.block_m * then.block_n <= now.block_m * now.block_n
        assert then != now


def test_a_triton_that_was_not_tried_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for release, said in ((CENSUS_RELEASE, 0), ((3, 6), 0), ((3, 8), 0), ((3, 99), 1)):
        monkeypatch.setattr(releases, "RELEASE", release)
        launch._say_untried.cache_clear()
        with caplog.at_level("WARNING", "tvkd_fast"):
            for device in range(2):
                launch._device_target.cache_clear()
                launch._device_target(device)
        assert len(caplog.records) == said
    assert "python -m bench.census.tritons says which" in caplog.text
    launch._say_untried.cache_clear()
    launch._device_target.cache_clear()


@pytest.mark.parametrize("size", [1, 40, 576, 2048, 4096, 5120, 8192, 8193, 12288, 18432])
def test_gathers_cover_a_row_and_hold_what_registers_have(size: int) -> None:
    config = GatherConfig.of(size)
    assert config.tiles * config.block_d >= size > (config.tiles - 1) * config.block_d
    assert config.block_e * config.block_d <= 32 * config.warps * GATHERED_FLOATS


def demand_of(build: Build) -> Demand:
    on = {name for name, value in build.switches.items() if value is True}
    heavy = not on.isdisjoint({"HAS_SOFTCAP", "HAS_ENTROPY", "UNBIASED"})
    return Demand(build.dtype == "fp32", heavy, "HAS_BIAS" in on, build.aligned)


def test_rows_cite_the_census() -> None:
    """The most registers and shared memory of all binaries that take a row's tiles."""
    found: dict[Row, list[dict[str, Any]]] = defaultdict(list)
    made = {(build.kernel, build.target, build.dtype, build.variant): build for build in builds()}
    for entry in json.loads(CENSUS.read_text())["rows"]:
        build = made[tuple(entry["build"][name] for name in ("kernel", "target", "dtype", "variant"))]
        tiles = entry["build"]["config"]
        if tiles is not None:
            row = row_of(build.kernel, FAMILIES[build.target], demand_of(build), CENSUS_RELEASE)
            assert tiles == {name: getattr(row.tiles, name) for name in tiles}
            found[row].append(entry["facts"])
    for row in TABLE:
        facts = found[row]
        assert row.registers == max((x["registers"] for x in facts), default=None), row
        assert row.shared_kib == max((math.ceil(x["shared"] / 1024) for x in facts), default=None), row
        assert {x["spills"] for x in facts} <= {0}, row


@pytest.mark.parametrize(
    ("capability", "target", "said"),
    [
        ((8, 0), "sm_80", False),
        ((8, 9), "sm_86", False),
        ((9, 0), "sm_90", False),
        ((10, 3), "sm_100", False),
        ((12, 1), "sm_86", False),
        ((8, 8), "sm_86", True),
        ((11, 0), "sm_86", True),
        ((13, 0), "sm_86", True),
    ],
)
def test_a_device_gets_its_tiles_or_those_that_every_device_runs(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    target: str,
    said: bool,
) -> None:
    launch._device_target.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level("WARNING", "tvkd_fast"):
        assert [launch._device_target(0), launch._device_target(0)] == [target] * 2
    launch._device_target.cache_clear()
    assert len(caplog.records) == said
    assert not said or "sm_{}{}".format(*capability) in caplog.text


def test_a_device_of_before_bfloat16_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    launch._device_target.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="no kernel is configured for sm_75: take impl='torch'"):
        launch._device_target(0)


def test_rows_that_are_not_aligned_are_said_once_per_shape(caplog: pytest.LogCaptureFixture) -> None:
    launch.say_unaligned.cache_clear()
    with caplog.at_level("WARNING", "tvkd_fast"):
        for shape in ((100, 40), (100, 40), (100, 24)):
            launch.say_unaligned((shape[1],), shape)
    assert len(caplog.records) == 2
    assert "[100, 40]" in caplog.records[0].getMessage()
