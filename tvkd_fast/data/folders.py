"""Folders that are whole or not there, and the checksums that tell."""

from __future__ import annotations

import hashlib
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
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    try:
        # What a kill left here the last time.
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
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


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
