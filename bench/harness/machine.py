"""The provenance of a figure, and its report file."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def made_by(threads: int | None = None) -> dict[str, Any]:
    """Versions, commit, machine and command of this process, without paths of the machine.

    `threads` are those of the processes that were timed, where they are not this one.
    """
    # Imported here: it takes all of the package, and a machine that checks kernels may have torch and Triton alone.
    from tvkd_fast.commands.demo import provenance

    return provenance(threads) | {"command": command()}


def command() -> str:
    """The command line of this process, without paths of the machine."""
    module = getattr(sys.modules["__main__"].__spec__, "name", Path(sys.argv[0]).name).removesuffix(".__main__")
    return without_paths(" ".join(["python -m", module, *sys.argv[1:]]))


def versions(*names: str) -> dict[str, str | None]:
    """Return the versions of packages, None for those that are not installed."""
    return {name: version(name) if importlib.util.find_spec(name.replace("-", "_")) else None for name in names}


def seconds(run: Callable[[], object]) -> float:
    since = time.perf_counter()
    run()
    return time.perf_counter() - since


def write_report(report: dict[str, Any], file: Path | None) -> None:
    """Write the report as JSON without the machine's paths, where a file was asked for."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(without_paths(json.dumps(report, indent=1)) + "\n")


def without_paths(text: str) -> str:
    """Absolute paths cut to their last part: where a file lay on one machine is nothing to another."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)*([\w.+-]+)", r"\1", text)
