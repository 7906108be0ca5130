"""The reports of the benchmarks of the teacher's cost, a step's parts, and steps by length."""

import random
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.step import lengths, profile, teacher_cost

    return teacher_cost, profile, lengths


@pytest.mark.e2e
def test_teaching_is_set_against_its_lower_bound(bench: Any) -> None:
    report = bench("step.teacher_cost", "--steps", "6", "--rounds", "1", "--pairs", "8")
    trained, scored = report["training"], report["scoring"]
    assert trained["interval_ms"][0] <= trained["difference_ms"] <= trained["interval_ms"][1]
    assert trained["allowed_ms"] == pytest.approx(3 + 0.01 * trained["dpo_ms"])
    assert scored["pairs"] == 8
    assert scored["speed_over_floor"] == scored["floor_seconds"][0] / scored["seconds"][0]


def test_the_interval_of_a_median_holds_it_nineteen_times_of_twenty(modules: Any) -> None:
    interval = modules[0].interval_of_median
    draw = random.Random(0)
    held = [low <= 0 <= high for low, high in (interval([draw.gauss(0, 1) for _ in range(200)]) for _ in range(1000))]
    assert 0.93 < sum(held) / 1000 < 0.98


@pytest.mark.e2e
def test_a_profile_is_of_the_whole_step(bench: Any) -> None:
    report = bench("step.profile", "--threads", "1", "--rounds", "1")
    for of in (report, report["compiled"]):
        assert sum(of["shares"].values()) == pytest.approx(1)
        assert all(share > 0 for share in of["shares"].values())
    assert report["compiled"]["over_plain"] > 0
    assert report["gflops"] > 0
    assert len(report["largest_product"]) == 3


def test_an_event_belongs_to_the_outermost_part(modules: Any) -> None:
    class Event:
        def __init__(self, name: str, parent: Any = None) -> None:
            self.name, self.cpu_parent = name, parent

    part_of = modules[1].part_of
    step = Event("step")
    assert part_of(Event("aten::mm", step)) == "backbone's products"
    assert part_of(Event("aten::mm", Event("tvkd_fast::linear_logps", step))) == "head"
    assert part_of(Event("aten::bmm", Event("aten::_scaled_dot_product_attention_math", step))) == "attention"
    assert part_of(Event("aten::add", step)) == modules[1].REST


@pytest.mark.e2e
def test_lengths_share_a_number_of_tokens(bench: Any) -> None:
    report = bench("step.lengths", "16", "64", "--steps", "2")
    short, long = report["points"]
    assert (short["length"], short["pairs_per_step"], long["pairs_per_step"]) == (16, 4, 1)
    assert short["tokens"] == long["tokens"] == 2 * 96
    assert short["max_length"] == 16


@pytest.mark.parametrize(("alike", "row"), [(False, 6144), (True, 768)])
def test_a_micro_batch_of_lengths_is_a_row_or_a_pair(
    modules: Any, monkeypatch: pytest.MonkeyPatch, alike: bool, row: int
) -> None:
    lengths = modules[2]
    asked: list[str] = []

    def run(command: list[str], check: bool) -> None:
        asked.extend(command)
        Path(command[-1]).write_text("{}")

    monkeypatch.setattr(lengths.subprocess, "run", run)
    assert lengths.point(512, 4096, 3, ["--layers", "4"], alike=alike) == {"length": 512}
    assert asked[asked.index("--tokens_per_micro_batch") + 1] == str(row)
