"""Folders that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole_folder(target: Path, what: str) -> Iterator[Path]:
    """A folder to write into that takes `target`'s place only once the block is through.

    The old one stands until then, and is put back where the new one cannot take its place. Raises ValueError, with what
    to do about it, where the disk refuses; nothing half-written is left.
    """
    beside = f".{target.name}.{{}}-{os.getpid()}"
    partial, old = target.with_name(beside.format("partial")), target.with_name(beside.format("old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        kept = f"; {target} is as it was" if target.exists() else ""
        raise ValueError(
            f"could not save {what} to {target}: {error}. Free some space and run it again{kept}"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
