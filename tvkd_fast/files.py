"""Places on disk: tried before the work whose results go there, and folders that are whole or absent."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from os.path import expanduser
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError


def ready_folder(path: str | Path, *, holds: tuple[str, ...] = ()) -> Path:
    """Make the folder and those above it, and try to write there; `holds` names the folders that will be in it.

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
    """Raise the errors of `ready_folder` that can be found without creating anything."""
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
    """Open the file for appending, once, and make the folders above it. Raises ValueError where that fails."""
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise refuse_place(file, "file", error) from error
    return file


@contextmanager
def written(path: Path, then: str = "run the same command again") -> Iterator[None]:
    """Turn an OSError of the block into a ValueError that names the next step."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"could not write {path}: {error}. Free some space, or see who may write there, and {then}"
        ) from error


def in_a_line(error: OSError) -> str:
    """Describe the error in one line: the file and the reason."""
    if error.filename is None:
        return " ".join(str(error).split()) or type(error).__name__
    where = f"{error.filename} to {error.filename2}" if error.filename2 is not None else error.filename
    return f"{where}: {error.strerror or type(error).__name__}"


def unfinished(target: Path) -> Path:
    """Return the place of a folder that is still being written."""
    return target.with_name(f".{target.name}.partial")


def put_in_place(target: Path, what: str) -> None:
    """Let what is whole now take `target`'s place; the old one is put back where it cannot. ValueError then."""
    old = put_back(target)
    try:
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        unfinished(target).rename(target)
    except OSError as error:
        put_back(target)
        raise _refused(target, what, error) from error
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_folder(target: Path, what: str) -> Iterator[Path]:
    """A folder to write into that takes `target`'s place only once the block is through.

    The old one stands until then, and is put back where the new one cannot take its place. Raises ValueError, with what
    to do about it, where the disk refuses; nothing half-written is left.
    """
    partial = unfinished(target)
    put_back(target)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _refused(target, what, error) from error
    put_in_place(target, what)


def put_back(target: Path) -> Path:
    """Return the place that the old folder is moved to, after moving it back where `target` is missing: a kill may have
    come between the two renames of `put_in_place`. Several processes may call this at once."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        with suppress(FileNotFoundError):
            old.rename(target)
    return old


@contextmanager
def written_here_alone(target: Path) -> Iterator[None]:
    """Refuse, by ValueError, a second process that would write the folder, or what is to take its place, meanwhile.

    A lock ends with its process, whatever ends that; a file system that has none is taken as it is.
    """
    with ExitStack() as held:
        for folder in filter(Path.is_dir, (unfinished(target), target)):
            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{target} is being written by another process: wait for it to end") from None
            except OSError:
                continue
        yield


def refuse_place(path: Path, what: str, error: OSError) -> ValueError:
    """The error of a place where nothing can be written: which one, why, and what to do."""
    why = error.strerror or type(error).__name__
    at = "" if error.filename is None or Path(error.filename) == path else f" ({error.filename})"
    return ValueError(f"no {what} can be written at {path}: {why}{at}. Give another place, or see who may write there")


def _refused(target: Path, what: str, error: Exception) -> ValueError:
    kept = f"; {target} is as it was" if target.exists() else ""
    return ValueError(f"could not save {what} to {target}: {error}. Free some space and run it again{kept}")


def to_disk(path: Path) -> None:
    """Flush a file to disk, so that it survives a power failure."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a file that is the old or the new one, whatever happens meanwhile, and that survives a power failure."""
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(text)
    to_disk(fresh)
    os.replace(fresh, path)


def signed_json(body: dict[str, Any]) -> str:
    """The text of a JSON file with a checksum of its own: a file that differs from it is damaged."""
    checksum = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body | {"checksum": checksum}, indent=1) + "\n"


class MissingError(ValueError):
    """There is no such file, as opposed to one that cannot be read."""


class Signed(Protocol):
    """What is written as `signed_json`."""

    def text(self) -> str: ...


M = TypeVar("M", bound=Signed)


def read_signed(
    path: Path, make: Callable[[dict[str, Any]], M], *, formats: Sequence[int], command: str, missing: str
) -> M:
    """What `make` makes of the body of a file that `signed_json` wrote.

    Raises MissingError where it is `missing`, and ValueError where it is of none of these formats, damaged, or cannot
    be read: `command` is what to run again.
    """
    try:
        text = path.read_bytes().decode()
        body = json.loads(text)
        if isinstance(body, dict) and body.get("format") not in formats:
            read = f"{', '.join(map(str, formats[:-1]))} and {formats[-1]}" if len(formats) > 1 else str(formats[0])
            raise ValueError(
                f"{path} is of format {body.get('format')}, this library reads {read}: run {command} again"
            )
        del body["checksum"]
        made = make(body)
        if made.text() != text:
            raise TypeError("it is not what was written")
    except FileNotFoundError:
        raise MissingError(missing) from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); run {command} again") from error
    return made


class Checksummed(Protocol):
    @property
    def file(self) -> str: ...

    @property
    def sha256(self) -> str: ...


F = TypeVar("F", bound=Checksummed)


def whole_files(folder: Path, files: Iterable[F]) -> tuple[F, ...]:
    """Those of the files in the folder that stand before the first that is missing or torn."""
    return tuple(takewhile(lambda x: is_whole(folder, x), files))


def is_whole(folder: Path, one: Checksummed) -> bool:
    path = folder / one.file
    return path.is_file() and sha256_of(path) == one.sha256


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


PATHS = frozenset(
    {
        "compare",
        "eval",
        "eval_scores",
        "generate",
        "out",
        "output",
        "output_dir",
        "policy",
        "recipe",
        "reference",
        "rejected_policy",
        "reward_model",
        "scores",
        "teacher",
        "teacher_reference",
        "train",
    }
)
"""Fields, of whichever config, that may name a place on this machine."""


def at_home(config: Any) -> None:
    """Expand `~` in a config's paths, in place: no shell does that for YAML or for `--option=~/x`."""
    for name in PATHS & vars(config).keys():
        value = getattr(config, name)
        if isinstance(value, str):
            setattr(config, name, expanduser(value))
        elif isinstance(value, list):
            setattr(config, name, [expanduser(x) for x in value])
