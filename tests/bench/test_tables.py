"""Reports that are kept: all that their tables read, and no more."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)
    from bench.tables import pages

    return pages


def census() -> dict[str, Any]:
    numbers = ("registers", "stack", "spills", "shared", "programs", "bulk_loads", "wide_loads", "narrow_loads")
    facts: dict[str, Any] = dict.fromkeys((*numbers, "exps", "length", "epilogue"), 7) | {"tensor": {"HMMA": 64}}
    tile = dict.fromkeys(("block_m", "block_n", "block_k", "warps", "stages", "group", "split_tiles"), 8)
    build = {"kernel": "dlogits", "target": "sm_90", "variant": "odd D", "switches": {"HAS_BIAS": True}, "warps": 4}
    rows = [
        {"build": build | {"dtype": dtype, "config": config}, "facts": facts, "broken": []}
        for dtype in ("bf16", "fp16")
        for config in (tile, None)
    ]
    rejected = [rows[0] | {"broken": ["9 spills"]}]
    made = dict.fromkeys(("torch", "transformers", "python", "triton", "commit", "machine", "command"), "x")
    return {"rows": rows, "rejected": rejected, "made_by": made}


def test_a_census_is_kept_with_all_that_its_tables_read(pages: Any) -> None:
    from bench.tables.kernels import census_kept, census_table, epilogues_table, rejected_table

    report = census()
    kept = census_kept(report)
    for table in (census_table, rejected_table, epilogues_table):
        assert table(kept) == table(report)
    assert "switches" in json.dumps(report)
    assert not {"switches", "narrow_loads", "group"} & set(json.dumps(kept).split('"'))
    assert census_kept(kept) == kept


def test_a_report_is_added_without_what_nothing_reads(pages: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(pages, "PICTURES", tmp_path)
    report = tmp_path / "out.json"
    report.write_text(json.dumps(census()))
    report.with_suffix(".png").write_bytes(b"picture")
    pages.add("census", report)
    written = (tmp_path / "results" / "census.json").read_text()
    assert json.loads(written) == pages.KEPT["census"](census())
    # One line per row, so that a change of one is seen as one.
    assert sum('"kernel":"dlogits"' in line for line in written.splitlines()) == 5
    assert (tmp_path / "census.png").read_bytes() == b"picture"
    pages.add("other", report)
    assert json.loads((tmp_path / "results" / "other.json").read_text()) == census()


@pytest.mark.skipif(not RESULTS.is_dir(), reason="bench/results is no part of an sdist")
def test_large_results_hold_no_more_than_is_read(pages: Any) -> None:
    for name, kept in pages.KEPT.items():
        report = json.loads((RESULTS / f"{name}.json").read_text())
        assert kept(report) == report
    assert all(file.stat().st_size < 2**20 for file in RESULTS.glob("*.json"))


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_commands_have_modules(page: Path) -> None:
    for module in re.findall(r"python -m (bench[a-z_.]*)", page.read_text(encoding="utf-8")):
        place = ROOT.joinpath(*module.rstrip(".").split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
