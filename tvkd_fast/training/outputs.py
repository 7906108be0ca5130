"""Places that results go to: made, and tried, before the work whose results they are."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tvkd_fast.data.folders import refuse_place


def ready_folder(path: str | Path, *, holds: tuple[str, ...] = ()) -> Path:
    """The folder, made with those above it and written into once; `holds` names the folders that will be in it.

    Raises ValueError where it cannot be.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".trial-{os.getpid()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise refuse_place(folder, "folder", error) from error
    _check_holds(folder, holds)
    return folder


def check_folder(path: str | Path, *, holds: tuple[str, ...] = ()) -> None:
    """Raise what `ready_folder` would, as far as that can be told without making anything."""
    folder = Path(path)
    there = next(above for above in (folder, *folder.absolute().parents) if above.exists())
    if not there.is_dir():
        raise refuse_place(folder, "folder", NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there)))
    if not os.access(there, os.W_OK | os.X_OK):
        raise refuse_place(folder, "folder", PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there)))
    _check_holds(folder, holds)


def _check_holds(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a file, where a folder is to be: move it, or give another place")


def ready_file(path: str | Path) -> Path:
    """The file, opened to be appended to, and the folders above it made. Raises ValueError where it cannot be."""
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise refuse_place(file, "file", error) from error
    return file


@contextmanager
def written(path: Path, then: str = "run the same command again") -> Iterator[None]:
    """Says what to do where the disk does not take a small file. Raises ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"could not write {path}: {error}. Free some space, or see who may write there, and {then}"
        ) from error


def in_a_line(error: OSError) -> str:
    """What went wrong with which file."""
    if error.filename is None:
        return " ".join(str(error).split()) or type(error).__name__
    where = f"{error.filename} to {error.filename2}" if error.filename2 is not None else error.filename
    return f"{where}: {error.strerror or type(error).__name__}"
