"""The splits of a folder's files.

`datasets` says so, as it does for a repository of the hub: by the `configs` of README.md's YAML, by
`data/SPLIT-00000-of-00001.*`, by folders' names, by files' names. Where it goes by a word in a name, files are put
together only if their names differ by numbers at most; others are splits of the names that they have.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
FILE_SUFFIXES = (*JSON_SUFFIXES, ".parquet")

_TABLES = (*FILE_SUFFIXES, ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".arrow")
"""Endings of files that hold rows, whether they are read here or not."""
_SHARD = re.compile(r"-(\d{5})-of-(\d{5}).*")
_NUMBER = re.compile(r"[-_. ]*\d+")

_ANY = "*"
"""The split of files whose names give none: one set is any of them, as a single file is."""

Splits = dict[str, list[Path]]


def folder_of_subset(folder: Path, subset: str) -> tuple[Path, str | None]:
    """Returns where a subset lies: the folder and one of its configurations, or a folder inside that is all of it."""
    configs = _configs(folder)
    if subset in configs:
        return folder, subset
    if (folder / subset).is_dir():
        return folder / subset, None
    has = f"it has the configurations {', '.join(configs)}" if configs else _listing(folder)
    raise ValueError(f"{folder} has no folder {subset!r} for that subset: {has}")


def files_of_split(folder: Path, split: str, config: str | None = None) -> list[Path]:
    """Returns the files of one split, in order.

    Args:
        folder: a copy of a dataset of the hub, or any folder of files.
        split: the split's name on the hub, or the name of a file or folder without its ending and shard number.
        config: a name among README.md's `configs`; its default one where it is None.

    Raises:
        ValueError: there is no such split, no file that can be read, or no saying which files belong together.
    """
    configs = _configs(folder)
    if config is None and configs:
        config = _default(folder, configs)
    declared = configs.get(config, {}) if config is not None else {}
    base = (folder / str(declared.get("data_dir") or "")).resolve()
    try:
        found, splits = _resolved(base, declared)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {', '.join(FILE_SUFFIXES)} file: {_listing(folder)}") from None
    except ValueError as error:  # names that datasets takes for no split's
        raise ValueError(f"{folder}: {error}: rename the split, in its README.md or of its files") from error
    files = splits.get(split) or splits.get(_ANY, [])
    if not files and found.get(split):
        names = ", ".join(sorted({file.name for file in found[split]})[:12])
        raise ValueError(
            f"{folder}: {names} may all be of the split {split!r}, or not: set --data.train_split or --data.eval_split "
            f"to one of {', '.join(splits)}, give the file itself, or say under configs: in its README.md what is what"
        )
    unmatched = _unmatched(base, split, declared)
    if unmatched and files:
        raise ValueError(
            f"{folder}: its README.md names {', '.join(unmatched)} for the split {split!r}, which match no file: copy "
            "the missing files, or take the names out"
        )
    if not files:
        shown = {name: ", ".join(file.name for file in own[:3]) for name, own in splits.items() if own}
        has = "; ".join(f"{name}: {names}" for name, names in shown.items()) or _listing(folder)
        if unmatched:
            has = f"{', '.join(unmatched)} in README.md matches no file; {has}"
        raise ValueError(
            f"{folder} has no file of the split {split!r}: set --data.train_split or --data.eval_split to one that it "
            f"has ({has})"
        )
    _refuse_formats(folder, split, files)
    _refuse_missing_shards(folder, split, files)
    return files


def _refuse_formats(folder: Path, split: str, files: list[Path]) -> None:
    unread = [file.name for file in files if not file.name.endswith(FILE_SUFFIXES)]
    if unread:
        suffixes = ", ".join(FILE_SUFFIXES)
        raise ValueError(f"{folder}: the split {split!r} has {', '.join(unread)}: save it as one of {suffixes}")
    twice = {file.parent / _stem(file) for file in files}
    if len(twice) < len(files):
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder}: the split {split!r} exists in several formats ({names}): keep one of them")


def _refuse_missing_shards(folder: Path, split: str, files: list[Path]) -> None:
    """Raises ValueError where files number their shards, and some are missing."""
    shards: dict[tuple[Path, int], set[int]] = {}
    for file in files:
        numbered = _SHARD.search(file.name)
        if numbered is not None:
            whole = file.with_name(file.name[: numbered.start()]), int(numbered[2])
            shards.setdefault(whole, set()).add(int(numbered[1]))
    missing = [
        f"{whole.name}-{i:05d}-of-{count:05d}"
        for (whole, count), found in sorted(shards.items())
        for i in sorted({*range(count)} - found)
    ]
    if missing:
        more = ", …" if len(missing) > 12 else ""
        raise ValueError(
            f"{folder}: the split {split!r} lacks {', '.join(missing[:12])}{more}: copy or download the missing files, "
            "or give a file itself to read it alone"
        )


def _unmatched(base: Path, split: str, declared: dict[str, Any]) -> list[str]:
    """The patterns of a split in README.md that match no file."""
    from datasets.data_files import resolve_pattern, sanitize_patterns

    if declared.get("data_files") is None:
        return []
    patterns = {str(name): own for name, own in sanitize_patterns(declared["data_files"]).items()}
    found = []
    for pattern in patterns.get(split, []):
        try:
            resolve_pattern(pattern, glob.escape(str(base)))
        except FileNotFoundError:
            found.append(pattern)
    return found


def _resolved(base: Path, declared: dict[str, Any]) -> tuple[Splits, Splits]:
    """Returns the splits as `datasets` finds them, and those of them and of single names that can be asked for."""
    from datasets.data_files import DEFAULT_PATTERNS_ALL, SPLIT_PATTERN_SHARDED, get_data_patterns, sanitize_patterns

    if declared.get("data_files") is not None:
        found = _matching(sanitize_patterns(declared["data_files"]), base)
        return found, found
    patterns = {str(split): of_split for split, of_split in get_data_patterns(glob.escape(str(base))).items()}
    found = _matching(patterns, base)
    if patterns == {split: [SPLIT_PATTERN_SHARDED.format(split=split)] for split in patterns}:
        return found, found
    every = [file for files in found.values() for file in files]
    if not every:
        raise FileNotFoundError(base)
    by_word = [*patterns.values()] != [*DEFAULT_PATTERNS_ALL.values()] or any(_SHARD.search(f.name) for f in every)
    asked_for: Splits = {}
    for split, files in found.items():
        by_name: Splits = {}
        for file in files:
            by_name.setdefault(_name(file, split, base), []).append(file)
        one_set = len({_NUMBER.sub("", name) for name in by_name}) == 1
        if one_set or not by_word:
            asked_for[split] = files
        if one_set and not by_word:
            asked_for[_ANY] = files
        asked_for |= {name: own for name, own in by_name.items() if name not in found}
    return found, asked_for


def _matching(patterns: dict[str, Any], base: Path) -> Splits:
    """Each split's files that hold rows, each once."""
    from datasets.data_files import resolve_pattern

    found: Splits = {}
    for split, of_split in patterns.items():
        files: dict[Path, None] = {}
        for pattern in of_split:
            try:
                files |= {Path(file): None for file in resolve_pattern(pattern, glob.escape(str(base)))}
            except FileNotFoundError:
                continue
        found[split] = [file for file in files if file.name.endswith(_TABLES)]
    return found


def _name(file: Path, split: str, base: Path) -> str:
    """Return the name that shows a file's split: its folder's, if named so, else its own without ending and shard."""
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    words = "|".join({str(key): value for key, value in SPLIT_KEYWORDS.items()}.get(split, [re.escape(split)]))
    word = re.compile(rf"(^|[{NON_WORDS_CHARS}])({words})([{NON_WORDS_CHARS}]|$)")
    folders = [part for part in file.relative_to(base).parts[:-1] if word.search(part)]
    return folders[0] if folders else _SHARD.sub("", _stem(file))


def _stem(file: Path) -> str:
    ending = max((end for end in _TABLES if file.name.endswith(end)), key=len, default="")
    return file.name.removesuffix(ending)


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return f"it holds {', '.join(names[:12]) or 'nothing'}{', …' if len(names) > 12 else ''}"


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """README.md's `configs` by name, overridden by `.huggingface.yaml`."""
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import metadata_load

    readme, alone = folder / "README.md", folder / ".huggingface.yaml"
    try:
        configs = (metadata_load(readme) if readme.is_file() else None) or {}
        if alone.is_file():
            configs |= yaml.safe_load(alone.read_text(encoding="utf-8")) or {}
        return dict(MetadataConfigs.from_dataset_card_data(configs))
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{folder}: the YAML of its README.md cannot be read ({message}): mend it") from error


def _default(folder: Path, configs: dict[str, dict[str, Any]]) -> str:
    from datasets.utils.metadata import MetadataConfigs

    try:
        name = MetadataConfigs(configs).get_default_config_name()
    except ValueError as error:
        raise ValueError(f"{folder}: {error} Set --data.subset to one of {', '.join(configs)}") from error
    if name is None:
        raise ValueError(f"{folder} has several configurations: set --data.subset to one of {', '.join(configs)}")
    return name
