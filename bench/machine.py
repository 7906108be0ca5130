"""What a figure was made with."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from tvkd_fast.training.road import provenance


def made_by() -> dict[str, Any]:
    """Versions, commit, machine and command of this process, without paths of the machine."""
    module = getattr(sys.modules["__main__"].__spec__, "name", Path(sys.argv[0]).name)
    return provenance() | {"command": without_paths(" ".join(["python -m", module, *sys.argv[1:]]))}


def without_paths(text: str) -> str:
    """Absolute paths cut to their last part: where a file lay on one machine is nothing to another."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)*([\w.+-]+)", r"\1", text)
