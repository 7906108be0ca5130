"""The manifest of a folder of scores: the data, models and settings that it was made of, and its checksums."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

from tvkd_fast.files import read_signed, signed_json

FORMAT = 5
"""Format 4 kept nothing per token, format 3 did not say either which numbers are kept; both are read as well."""

_OF_TOKENS = ("states_dtype", "rotation", "head")

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Part:
    """Another file of the folder."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One file of the cache: pairs that follow those of the shard before."""

    file: str
    pairs: int
    states: int
    sha256: str
    beside: tuple[Part, ...] = ()
    """The files of what is kept of these pairs' tokens, one of each kind."""


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
    """The names of the kept numbers, in their order, and of what is kept per token; None in format 3."""
    states_dtype: Literal["int8", "bfloat16"] | None = None
    """The dtype of the teacher's states, where they are kept."""
    rotation: int | None = None
    """The seed of the rotation that int8 states, and their head, are kept under."""
    head: Part | None = None
    """The file of the states' head."""
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
        return replace(self, shards=(), versions={}, head=None) == replace(other, shards=(), versions={}, head=None)

    def text(self) -> str:
        """Return the manifest file's exact text, with a checksum of its own: a file that differs is damaged."""
        body = asdict(self)
        if self.format < 5:
            for name in _OF_TOKENS:
                del body[name]
            for shard in body["shards"]:
                del shard["beside"]
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
        formats=(3, 4, FORMAT),
        command="`tvkd score`",
        missing=f"no score cache at {folder}: make one with `tvkd score --output_dir {folder} …`",
    )
    if finished and not manifest.finished:
        raise ValueError(f"{path} names {len(manifest.shards)} shards of a run that is not finished: run it again")
    return manifest


def _made(body: dict[str, Any]) -> ScoreManifest:
    numbers, head = body.get("numbers"), body.get("head")
    shards = tuple(
        Shard(**shard | {"beside": tuple(Part(**part) for part in shard.get("beside", ()))}) for shard in body["shards"]
    )
    made = {"numbers": None if numbers is None else tuple(numbers), "head": None if head is None else Part(**head)}
    return ScoreManifest(**body | made | {"shards": shards})
