"""The objectives by name: every file of this folder, and of those in it, with `@objective(name)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from pkgutil import walk_packages
from typing import TypeVar

from tvkd_fast.objectives.contract import Objective

T = TypeVar("T", bound=type[Objective])

DEFAULT = "tvkd"

_REGISTERED: dict[str, type[Objective]] = {}


def objective(name: str, *, source: str = "–") -> Callable[[T], T]:
    """Makes a class the objective of this name, whose formula was read at `source`."""

    def register(cls: T) -> T:
        other = _REGISTERED.get(name)
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise ValueError(f"there are two objectives {name!r}: {other.__module__} and {cls.__module__}; rename one")
        cls.name, cls.source = name, source
        _REGISTERED[name] = cls
        return cls

    return register


def objectives() -> Mapping[str, type[Objective]]:
    """All of them, in the order of their names."""
    package = import_module(__package__)
    for module in walk_packages(package.__path__, f"{__package__}."):
        if not module.name.endswith(".__main__"):
            import_module(module.name)
    return dict(sorted(_REGISTERED.items()))


def objective_named(name: str) -> type[Objective]:
    """Raise ValueError for a name that no objective has."""
    found = objectives()
    if name not in found:
        close = get_close_matches(name, found, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"objective must be one of {', '.join(found)}, got {name!r}{hint}")
    return found[name]


def settings_of(name: str, settings: Objective) -> Objective:
    """The settings of that objective: those given, or its defaults where they are the bare `Objective()`.

    ValueError where they are another objective's.
    """
    cls = objective_named(name)
    if type(settings) is Objective:
        return cls()
    if not isinstance(settings, cls):
        raise ValueError(
            f"the settings are of the objective {settings.name} and not of {name}: set objective={settings.name!r}, or "
            f"give it {cls.__name__}(...)"
        )
    return settings


def shared_settings(name: str, settings: Objective) -> Objective:
    """The objective of that name under the settings that another one has in common with it."""
    cls = objective_named(name)
    own = settings_names(cls)
    return cls(**{key: value for key, value in settings.settings().items() if key in own})


def settings_names(cls: type[Objective]) -> list[str]:
    return [field.name for field in fields(cls)]
