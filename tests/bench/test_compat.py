"""The report of tests under other versions: what is counted, and a row per versions."""

import pytest

from bench.runs import compat

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="right"/>
<testcase classname="tests.a" name="left out"><skipped message="no GPU"/></testcase>
<testcase classname="tests.a" name="wrong"><failure message="off">assert 1 == 2</failure></testcase>
<testcase classname="tests.b" name="broken"><error message="fixture">ValueError</error></testcase>
<testcase classname="tests.b" name="refused"><failure message="x">
ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0</failure></testcase>
</testsuite></testsuites>"""


def test_a_library_that_refuses_another_is_no_failure() -> None:
    assert compat.counted(JUNIT) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "refused": 1,
        "failures": ["tests.a::wrong", "tests.b::broken"],
    }


def test_of_pieces_each_test_counts_once_by_its_last_report() -> None:
    again = """<testsuites><testsuite><testcase classname="tests.a" name="wrong"/>
<testcase classname="tests.c" name="right"/></testsuite></testsuites>"""
    found = compat.counted(JUNIT, again)
    assert (found["passed"], found["failures"]) == (3, ["tests.b::broken"])


@pytest.mark.parametrize("again", [False, True])
def test_a_row_takes_the_place_of_its_versions_row(again: bool) -> None:
    versions = [{"torch": torch, "triton": "3.9.0"} for torch in ("2.11.0", "2.13.0+cpu")]
    report = {"rows": [{"versions": x, "passed": 1} for x in reversed(versions)]}
    new = {"versions": versions[0] if again else {"torch": "2.12.1", "triton": "3.9.0"}, "passed": 2}
    rows = compat.added(report, new)["rows"]
    assert [row["versions"]["torch"] for row in rows] == ["2.11.0", *["2.12.1"] * (not again), "2.13.0+cpu"]
    assert [row["passed"] for row in rows if row["versions"] == new["versions"]] == [2]
