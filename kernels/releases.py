"""The releases of Triton that the tiles were compiled with."""

from __future__ import annotations

import triton

Release = tuple[int, int]
"""A release of Triton: its major and its minor number."""
CENSUS_RELEASE = (3, 9)
"""The release that TABLE and its census are of."""
RELEASES: tuple[Release, ...] = ((3, 6), (3, 7), (3, 8), CENSUS_RELEASE)
"""Releases under which the binaries nearest to a spill were compiled (`python -m bench.census.tritons`)."""
RELEASE: Release = tuple(int(part) for part in triton.__version__.split(".")[:2])  # type: ignore[assignment]
"""The release that is installed."""


def untried() -> str | None:
    """What to say where the installed Triton is none that the tiles were compiled with; None where it is one."""
    if RELEASE in RELEASES:
        return None
    tried = ", ".join(f"{major}.{minor}" for major, minor in RELEASES)
    return (
        f"tiles were compiled with Triton {tried}, and {triton.__version__} is installed, under which some may spill: "
        "from a checkout, python -m bench.census.tritons says which"
    )
