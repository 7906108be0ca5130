"""The table of objectives, and the page that shows it."""

from pathlib import Path
from runpy import run_module

import pytest

from tvkd_fast.objectives import objectives
from tvkd_fast.objectives.catalogue import COLUMNS, formula, row, table
from tvkd_fast.objectives.divergences.adpa import ADPA
from tvkd_fast.objectives.divergences.forward_kl import ForwardKL
from tvkd_fast.objectives.divergences.tdpo1 import TDPO1
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.mixtures.mixture import Mixture
from tvkd_fast.objectives.onpolicy.opd import OPD
from tvkd_fast.objectives.onpolicy.opd_sampled import SampledOPD
from tvkd_fast.objectives.sft import SFT
from tvkd_fast.objectives.tvkd import TVKD
from tvkd_fast.objectives.wpo import WPO

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_the_page_has_the_table_that_the_code_makes() -> None:
    found = [line for line in PAGE.read_text().splitlines() if line.startswith(("| name |", "| `"))]
    lines = table().splitlines()
    missing = [line for line in lines if line not in PAGE.read_text().splitlines()]
    assert not missing, "copy what `python -m tvkd_fast.objectives` prints into docs/objectives.md"
    assert found[: len(lines) - 1] == [lines[0], *lines[2:]]


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    run_module("tvkd_fast.objectives", run_name="__main__")
    assert capsys.readouterr().out == table() + "\n"


@pytest.mark.parametrize("name", objectives())
def test_every_objective_says_its_formula_and_its_source(name: str) -> None:
    cls = objectives()[name]
    assert len(row(cls)) == len(COLUMNS)
    assert "Objective" not in formula(cls)
    assert formula(cls)
    assert cls in (SFT, Mixture) or cls.source.startswith("arXiv ")


def test_costs_follow_from_needs() -> None:
    costs = {cls: row(cls)[4:7] for cls in (SFT, DPO, TVKD, WPO, ForwardKL, TDPO1, ADPA, OPD, SampledOPD)}
    assert costs == {
        SFT: ("0", "3", "1"),
        DPO: ("4 per response", "3", "2"),
        TVKD: ("4 per token, 4 per response", "3", "3"),
        WPO: ("4 per response", "4", "2"),
        ForwardKL: ("D′ + 4 per token", "3 + r", "2"),
        TDPO1: ("not cached", "4 + 2r", "2"),
        ADPA: ("not cached", "5 + 2r", "3"),
        OPD: ("not cached", "3 + r", "2"),
        SampledOPD: ("not cached", "4 + r", "2"),
    }
