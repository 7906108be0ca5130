"""Every test is in a tier: what the Makefile's tiers take together is what the suite holds."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
Marks = dict[str, frozenset[str]]
"""The marks of each test, by its id."""


def variable(name: str) -> str:
    """A variable of the Makefile, with what it names put in."""
    found = re.search(rf"^{name} := (.*)$", MAKEFILE, re.MULTILINE)
    assert found, name
    return re.sub(r"\$\((\w+)\)", lambda other: variable(other[1]), found[1])


class Names(Mapping[str, bool]):
    """Every name, true where it is one of the marks."""

    def __init__(self, marks: frozenset[str]) -> None:
        self.marks = marks

    def __getitem__(self, name: str) -> bool:
        return name in self.marks

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.marks)

    def __len__(self) -> int:
        return len(self.marks)


def chosen(expression: str, collected: Marks) -> set[str]:
    """Return the tests that `pytest -m EXPRESSION` runs."""
    return {test for test, marks in collected.items() if eval(expression, {}, Names(marks))}


def test_the_tiers_hold_every_test_once(collected: Marks) -> None:
    first, rest, network = (chosen(variable(name), collected) for name in ("FIRST", "REST", "NETWORK"))
    assert first | rest | network == set(collected)
    assert not network & (first | rest)
    # Drawn again, and more of it.
    assert all("hypothesis" in collected[test] for test in first & rest)
    assert first | rest == chosen(variable("ALL"), collected)


def test_a_test_outside_every_tier_is_found() -> None:
    planted = {"a": frozenset[str](), "b": frozenset({"slow"}), "c": frozenset({"network"}), "d": frozenset({"gpu"})}
    assert chosen(variable("FIRST"), planted) == {"a"}
    assert chosen(variable("REST"), planted) == {"b", "d"}
    assert chosen(variable("NETWORK"), planted) == {"c"}
    assert chosen(variable("FIRST"), {"a": frozenset({"hypothesis"})}) == {"a"}
    assert chosen(variable("REST"), {"a": frozenset({"hypothesis"})}) == {"a"}


@pytest.mark.parametrize("mark", variable("LATER").split(" or "))
def test_a_mark_says_why_in_the_settings_and_to_contributors(mark: str) -> None:
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert any(line.startswith(f"{mark}: ") for line in markers["markers"])
    assert f"| `{mark}` | " in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.each_once("slow")
@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize("b", ["x", "y", "z"])
def test_each_value_of_a_parameter_stays_in_the_first_tier(a: int, b: str, collected: Marks) -> None:
    """Test that three of six combinations show all values."""
    of_this = {test: marks for test, marks in collected.items() if "each_value_of_a_parameter" in test}
    assert {test for test, marks in of_this.items() if "slow" not in marks} == {
        test for test in of_this if any(f"[{case}]" in test for case in ("x-1", "y-2", "z-1"))
    }
