"""Configs as JSON keeps them, in checkpoints and in records of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from tvkd_fast.files import PATHS
from tvkd_fast.models.load import PACKAGED
from tvkd_fast.objectives import Objective, objective_named, settings_names

C = TypeVar("C")


def to_record(config: Any) -> dict[str, Any]:
    """Return the config as it is kept in JSON. Local files and folders become absolute paths, so that they are found
    from another working directory too; hub names stay as they are."""
    return {
        f.name: to_record(value)
        if is_dataclass(value := getattr(config, f.name))
        else _absolute(value)
        if f.name in PATHS
        else value
        for f in fields(config)
    }


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    is_local = isinstance(value, str) and value not in PACKAGED and Path(value).exists()
    return str(Path(value).absolute()) if is_local else value


def from_record(kind: type[C], record: Mapping[str, Any]) -> C:
    """Make a config from a record of `to_record` that was kept in JSON."""
    types = get_type_hints(kind)
    given: dict[str, Any] = {}
    for name, value in record.items():
        expected = types[name]
        if expected is Objective:
            settings = objective_named(record["objective"])
            # Before objectives had settings of their own, every run recorded all of TVKD's.
            own = settings_names(settings)
            given[name] = settings(**{key: x for key, x in value.items() if key in own})
        elif is_dataclass(expected) and isinstance(expected, type):
            given[name] = from_record(expected, value)
        else:
            given[name] = tuple(value) if get_origin(expected) is tuple else value
    return kind(**given)
