"""Every number of every config has a range, and what is outside it is refused by the option's name."""

import dataclasses
import math
from typing import get_args, get_origin, get_type_hints

import pytest

from tvkd_fast.cli.main import main
from tvkd_fast.cli.parser import COMMANDS
from tvkd_fast.objectives import Objective, objectives
from tvkd_fast.ops import HeadGradient
from tvkd_fast.ranges import FINITE, LARGEST, POSITIVE, Range, at_least, check_numbers, number, range_of
from tvkd_fast.training.train_config import TrainConfig

GIVEN = {"policy": "p", "teacher": "t", "output_dir": "o"}
NESTED = {
    kind: name
    for name, kind in get_type_hints(TrainConfig).items()
    if dataclasses.is_dataclass(kind) and kind is not Objective
} | dict.fromkeys(objectives().values(), "loss")
CONFIGS = [config for config, _ in COMMANDS.values()] + [kind for kind in NESTED if kind is not HeadGradient]


def numeric(config):
    """Fields of numbers, each with its type: int where it is whole, and whether it has several of them."""
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        inside = {types[field.name], *get_args(types[field.name])}
        if inside & {int, float}:
            yield field, int if int in inside else float, get_origin(types[field.name]) is tuple


FIELDS = [
    pytest.param(config, *of_field, id=f"{config.__name__}.{of_field[0].name}")
    for config in CONFIGS
    for of_field in numeric(config)
]


def make(config, name, value):
    needed = {f.name: GIVEN[f.name] for f in dataclasses.fields(config) if f.default is f.default_factory}
    return config(**needed | {name: value})


def test_configs_are_found():
    assert TrainConfig in CONFIGS
    assert len(FIELDS) > 50


@pytest.mark.parametrize(("config", "field", "kind", "several"), FIELDS)
def test_a_number_outside_its_range_is_refused_by_its_option(config, field, kind, several):
    limits = range_of(field)
    assert limits is not None, f"{config.__name__}.{field.name} has no range: make it a field by ranges.number"
    group = "" if config not in NESTED or config is TrainConfig else f"{NESTED[config]}."
    outside = [math.nan, math.inf, -math.inf, 10**400, -(10**400)]
    if limits.low > FINITE.low:
        outside += [limits.low if limits.without_low else limits.low - 1]
    if limits.high < FINITE.high:
        outside += [limits.high if limits.without_high else limits.high + 1]
    if kind is int:
        outside += [2.5, True]
    for bad in outside:
        with pytest.raises(ValueError, match=rf"^{field.name} must be .*, got {bad}: set --{group}{field.name}$"):
            make(config, field.name, (bad, bad) if several else bad)


@pytest.mark.parametrize(("config", "field", "kind", "several"), FIELDS)
def test_the_least_and_the_largest_number_of_a_range_are_taken(config, field, kind, several):
    limits, alone = range_of(field), {"eval_every", "teacher_reference"}
    for end, without in ((limits.low, limits.without_low), (limits.high, limits.without_high)):
        if FINITE.low < end < FINITE.high and not without and field.name not in alone:
            value = kind(end)
            assert getattr(make(config, field.name, (value, value) if several else value), field.name) is not None


@pytest.mark.parametrize("field", [f for f, *_ in numeric(HeadGradient)], ids=lambda field: field.name)
def test_the_heads_gradient_checks_its_own_numbers(field):
    for bad in (math.nan, -1, 2**64):
        if bad == 2**64 and field.name in ("row_cap", "workspace_mb"):
            continue
        with pytest.raises(ValueError, match=field.name):
            HeadGradient(**{field.name: bad})


def test_a_range_says_which_numbers_it_holds():
    assert (str(POSITIVE), str(FINITE), str(at_least(2))) == ("a positive number", "finite", "at least 2")
    assert str(Range(0, 0.5, without_high=True)) == "in [0, 0.5)"
    assert 0.5 not in Range(0, 0.5, without_high=True)
    assert LARGEST in at_least(0)
    assert LARGEST + 1 not in at_least(0)


def test_a_tuple_of_another_length_is_refused():
    @dataclasses.dataclass
    class Two:
        pair: tuple[float, float] = number((0.0, 0.0), FINITE)

    with pytest.raises(ValueError, match=r"pair must be 2 numbers, got \[1.0\]: set --of.pair"):
        check_numbers(Two(pair=(1.0,)), "of")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", ".inf"),
        ("--epochs", "nan"),
        ("--optim.clip_norm", ".nan"),
        ("--seed", str(2**64)),
        ("--seed", "-1"),
        ("--parallel.replicas", "0"),
        ("--lora.alpha", "0"),
    ],
)
def test_the_command_line_refuses_them_in_a_line(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--policy", "p", "--output_dir", "o", option, value])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert len(error.splitlines()) <= 2
