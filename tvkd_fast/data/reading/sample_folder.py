"""The folder that `tvkd sample` writes: shards of rows, and a manifest that names them with their checksums.

A shard holds the rows of consecutive prompts. The manifest is written anew after each, so that a killed run resumes
there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tvkd_fast.files import sha256_of, signed_json

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
    path = folder / SAMPLES
    try:
        text = path.read_bytes().decode()
        body = json.loads(text)
        if isinstance(body, dict) and body.get("format") != FORMAT:
            raise ValueError(f"{path} is of format {body.get('format')}, this library reads {FORMAT}: sample again")
        del body["checksum"]
        manifest = SampleManifest(**body | {"shards": tuple(SampleShard(**shard) for shard in body["shards"])})
        if manifest.text() != text:
            raise TypeError("it is not what was written")
    except FileNotFoundError:
        raise ValueError(f"no samples at {folder}: make some with `tvkd sample --output_dir {folder} …`") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): run `tvkd sample` again") from error
    return manifest


def sample_files(folder: Path) -> list[Path]:
    """The shards in order, once every byte matches its checksum. ValueError where one does not."""
    manifest = read_sample_manifest(folder)
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.is_file() or sha256_of(path) != shard.sha256:
            raise ValueError(f"{path} does not match its checksum: it is damaged; run `tvkd sample` again")
    # One without rows is no file that could be read.
    return [folder / shard.file for shard in manifest.shards if shard.rows]
