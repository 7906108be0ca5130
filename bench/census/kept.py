"""A cache of the facts of builds, keyed by all that they depend on, so that an unchanged build is compiled once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TVKD_CENSUS_KEPT", ROOT / "out" / "census"))
"""The folder that keeps the facts: out/census, which git ignores, or another folder that the environment names."""


def kept(build: Any, kernel: triton.JITFunction[Any], compiled: Callable[[Any], Any], made: type) -> Any:
    """`compiled(build)`, or its result from the folder, if the same source was compiled for the same build before.

    The key is over the kernel's source with that of all it calls, the build and its compiler options, Triton's
    version, and the census itself, which reads the binaries.
    """
    census = [(ROOT / "bench" / "census" / name).read_text() for name in ("binaries.py", "epilogue.py")]
    parts = [kernel.cache_key, repr(build), repr(build.options), triton.__version__, *census]
    file = FOLDER / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"
    if file.is_file():
        return made(**json.loads(file.read_text()))
    facts = compiled(build)
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Several processes compile side by side: a file is whole as soon as it has its name.
    whole = file.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps(asdict(facts)))
    whole.replace(file)
    return facts
