"""The manifest of a folder of scores: the data, models and settings that it was made of, and its checksums."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

from tvkd_fast.files import read_signed, signed_json

FORMAT = 4
"""Format 3 did not say which numbers are kept, and is read as well."""

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One file of the cache: pairs that follow those of the shard before."""

    file: str
    pairs: int
    states: int
    sha256: str


@dataclass(frozen=True)
class ScoreManifest:
    """The sources of the numbers. Fingerprints are sha256 in hex, a model's with what it holds before it; None where
    there was no such model. Those of older versions are of a model's weights alone: they are read, and no model is
    compared with them."""

    dataset: str
    """The fingerprint of the token ids, `PairDataset.fingerprint`, which covers truncation and tokenizer."""
    tokenizer: str
    teacher: str | None
    """The fingerprint of the teacher: weights, config, and the adapter that it came with."""
    reference: str | None
    """The fingerprint of the reference."""
    precision: str
    """Dtype of the weights and of the products: scores in one are not those in another."""
    kappa: float
    pairs: int
    states: int
    versions: dict[str, str]
    """Versions of this library, torch and transformers, for the record."""
    value_dtype: Literal["float32", "float16"] = "float32"
    """Dtype of what is kept a state; log-probabilities are float32."""
    teacher_reference: str | None = None
    """The fingerprint of the teacher's own reference, where its rewards are kept and not its sums."""
    teacher_tokens: str | None = None
    """The fingerprint of the token ids that the teacher read: the dataset's, unless it has a tokenizer of its own."""
    numbers: tuple[str, ...] | None = None
    """The names of the kept numbers, in their order; None in format 3."""
    shards: tuple[Shard, ...] = ()
    format: int = FORMAT

    @property
    def own_tokens(self) -> bool:
        """Whether the teacher read tokens of its own."""
        return self.teacher_tokens not in (None, self.dataset)

    @property
    def finished(self) -> bool:
        return sum(shard.pairs for shard in self.shards) == self.pairs

    def same_numbers(self, other: ScoreManifest) -> bool:
        """Return whether both describe the same numbers, whatever their count and writer."""
        return replace(self, shards=(), versions={}) == replace(other, shards=(), versions={})

    def text(self) -> str:
        """Return the manifest file's exact text, with a checksum of its own: a file that differs is damaged."""
        body = asdict(self)
        if self.format == 3:
            del body["numbers"]
        return signed_json(body)


def read_manifest(folder: str | Path, *, finished: bool = True) -> ScoreManifest:
    """The manifest as it stands in the folder.

    Raises ValueError where there is none, it is damaged, of another format, or of a run that is not finished.
    """
    path = Path(expanduser(folder)) / MANIFEST
    manifest = read_signed(
        path,
        _made,
        formats=(3, FORMAT),
        command="`tvkd score`",
        missing=f"no score cache at {folder}: make one with `tvkd score --output_dir {folder} …`",
    )
    if finished and not manifest.finished:
        raise ValueError(f"{path} names {len(manifest.shards)} shards of a run that is not finished: run it again")
    return manifest


def _made(body: dict[str, Any]) -> ScoreManifest:
    numbers = body.get("numbers")
    shards = tuple(Shard(**shard) for shard in body["shards"])
    return ScoreManifest(**body | {"numbers": None if numbers is None else tuple(numbers), "shards": shards})
