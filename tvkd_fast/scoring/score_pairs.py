"""The pairs that a score cache was made of, and the first at which a dataset differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from tvkd_fast.data.dataset import PairDataset
from tvkd_fast.scoring.cache import DIGESTS
from tvkd_fast.scoring.manifest import read_manifest


def pairs_alike(folder: str | Path, dataset: PairDataset) -> int | None:
    """Returns how many pairs, from the first on, are those of the cache; None where an older version wrote it."""
    alike = 0
    for held in _digests(Path(folder).expanduser()):
        if held is None:
            return None
        ours = dataset.pair_digests[alike : alike + len(held)]
        differs = next((i for i, (a, b) in enumerate(zip(held, ours, strict=False)) if a != b), len(ours))
        alike += differs
        if differs < len(held):
            break
    return alike


def first_difference(folders: list[str], dataset: PairDataset) -> str:
    """Names the first row that is not the cache's, of the folder that goes along longest; "" where none has digests."""
    known = {folder: alike for folder in folders if (alike := pairs_alike(folder, dataset)) is not None}
    if not known:
        return ""
    folder = max(known, key=lambda folder: known[folder])
    if known[folder] < len(dataset) and known[folder] < read_manifest(folder).pairs:
        return f"{dataset[known[folder]].row} is the first that differs from {folder}"
    return f"{folder} holds {read_manifest(folder).pairs:,} pairs, of which the first {known[folder]:,} are the same"


def _digests(folder: Path) -> Iterator[list[int] | None]:
    for shard in read_manifest(folder).shards:
        with safe_open(folder / shard.file, "pt") as file:
            yield file.get_tensor(DIGESTS).tolist() if DIGESTS in file.keys() else None  # noqa: SIM118
