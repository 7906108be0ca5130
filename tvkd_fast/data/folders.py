"""Folders that are whole or not there, and the checksums that tell."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def unfinished(target: Path) -> Path:
    """Where a folder lies until it is whole."""
    return target.with_name(f".{target.name}.partial")


def put_in_place(target: Path, what: str) -> None:
    """Let what is whole now take `target`'s place; the old one is put back where it cannot. ValueError then."""
    old = _put_back(target)
    try:
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        unfinished(target).rename(target)
    except OSError as error:
        _put_back(target)
        raise _refused(target, what, error) from error
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_folder(target: Path, what: str) -> Iterator[Path]:
    """A folder to write into that takes `target`'s place only once the block is through.

    The old one stands until then, and is put back where the new one cannot take its place. Raises ValueError, with what
    to do about it, where the disk refuses; nothing half-written is left.
    """
    partial = unfinished(target)
    # A kill may have come between two renames.
    _put_back(target)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _refused(target, what, error) from error
    put_in_place(target, what)


def _put_back(target: Path) -> Path:
    """Where the old folder stands aside, once it is back in its place if that is empty."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
    return old


def refuse_place(path: Path, what: str, error: OSError) -> ValueError:
    """The error of a place where nothing can be written: which one, why, and what to do."""
    why = error.strerror or type(error).__name__
    at = "" if error.filename is None or Path(error.filename) == path else f" ({error.filename})"
    return ValueError(f"no {what} can be written at {path}: {why}{at}. Give another place, or see who may write there")


def _refused(target: Path, what: str, error: Exception) -> ValueError:
    kept = f"; {target} is as it was" if target.exists() else ""
    return ValueError(f"could not save {what} to {target}: {error}. Free some space and run it again{kept}")


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
