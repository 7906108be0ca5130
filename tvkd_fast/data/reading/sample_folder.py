"""The folder that `tvkd sample` writes: shards of rows, and a manifest that names them with their checksums.

A shard holds the rows of consecutive prompts. The manifest is written anew after each, so that a killed run resumes
there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tvkd_fast.files import is_whole, read_signed, signed_json

FORMAT = 1
SAMPLES = "samples.manifest"
"""The manifest's name. It is JSON, and must not be taken for rows where the folder is read by others."""


@dataclass(frozen=True)
class SampleShard:
    """One file of rows."""

    file: str
    prompts: int
    rows: int
    counts: dict[str, dict[str, int]]
    """What was sampled for it, and what became of that: responses, tokens, those left out, by reason."""
    sha256: str


@dataclass(frozen=True)
class SampleManifest:
    """What the samples are a function of, and the shards that are whole."""

    made_of: dict[str, Any]
    """Fingerprints of models, tokenizer and prompts, and the settings."""
    prompts: int
    versions: dict[str, str] = field(default_factory=dict)
    shards: tuple[SampleShard, ...] = ()
    format: int = FORMAT

    @property
    def done(self) -> int:
        """Prompts whose rows are on disk."""
        return sum(shard.prompts for shard in self.shards)

    @property
    def finished(self) -> bool:
        return self.done == self.prompts

    def same_samples(self, other: SampleManifest) -> bool:
        """Whether both describe the same rows, whatever their writer."""
        return replace(self, shards=(), versions={}) == replace(other, shards=(), versions={})

    def text(self) -> str:
        return signed_json(asdict(self))


def read_sample_manifest(folder: Path) -> SampleManifest:
    """Raises ValueError where it is missing, damaged or of another format."""
    return read_signed(
        folder / SAMPLES,
        lambda body: SampleManifest(**body | {"shards": tuple(SampleShard(**shard) for shard in body["shards"])}),
        formats=(FORMAT,),
        command="`tvkd sample`",
        missing=f"no samples at {folder}: make some with `tvkd sample --output_dir {folder} …`",
    )


def sample_files(folder: Path) -> list[Path]:
    """The shards in order, once every byte matches its checksum. ValueError where one does not."""
    manifest = read_sample_manifest(folder)
    for shard in manifest.shards:
        if not is_whole(folder, shard):
            raise ValueError(
                f"{folder / shard.file} does not match its checksum: it is damaged; run `tvkd sample` again"
            )
    # One without rows is no file that could be read.
    return [folder / shard.file for shard in manifest.shards if shard.rows]
