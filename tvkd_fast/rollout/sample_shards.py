"""Samples on disk: shards of rows beside the folder whose place they take once the last is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from tvkd_fast.data.reading.sample_folder import SAMPLES, SampleManifest, SampleShard, read_sample_manifest
from tvkd_fast.files import put_in_place, refuse_place, sha256_of, to_disk, unfinished, whole_files, write_whole

Counts = Mapping[str, Mapping[str, int]]


class SampleWriter:
    """Writes rows shard by shard beside `folder`, as `ScoreWriter` writes scores.

    It resumes from a killed run's shards for the same samples; a torn one and those after it are made again. Older
    samples in `folder` stand until the last shard is whole.
    """

    def __init__(self, folder: str | Path, manifest: SampleManifest) -> None:
        self.folder = Path(expanduser(folder))
        check_sample_folder(self.folder)
        self.partial = unfinished(self.folder)
        try:
            self.partial.mkdir(exist_ok=True)
        except OSError as error:
            raise refuse_place(self.folder, "folder", error) from error
        self.manifest = replace(manifest, shards=self._kept(manifest))
        names = {SAMPLES, *(shard.file for shard in self.manifest.shards)}
        for path in self.partial.glob("*"):
            if path.name not in names:
                path.unlink()

    def _kept(self, manifest: SampleManifest) -> tuple[SampleShard, ...]:
        try:
            found = read_sample_manifest(self.partial)
        except ValueError:
            return ()
        return whole_files(self.partial, found.shards if found.same_samples(manifest) else ())

    def write(self, rows: Sequence[Mapping[str, Any]], prompts: int, counts: Counts) -> None:
        """The rows of the next `prompts` prompts. ValueError where the disk refuses; the shards before are kept."""
        path = self.partial / f"samples-{len(self.manifest.shards):05d}.jsonl"
        try:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            to_disk(path)
            of_shard = {name: dict(of_one) for name, of_one in counts.items()}
            shard = SampleShard(path.name, prompts, len(rows), of_shard, sha256_of(path))
            self.manifest = replace(self.manifest, shards=(*self.manifest.shards, shard))
            write_whole(self.partial / SAMPLES, self.manifest.text())
        except OSError as error:
            raise ValueError(
                f"could not save samples to {self.partial}: {error}. Free some space and run it again to resume at "
                f"prompt {self.manifest.done:,} of {self.manifest.prompts:,}"
            ) from error

    def finish(self) -> None:
        """Put all samples in their place."""
        assert self.manifest.finished
        put_in_place(self.folder, "samples")


def check_sample_folder(folder: Path) -> None:
    """Raise ValueError where samples cannot be written there, or something else would have to give way to them."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give --output_dir a folder of its own")
    if folder.exists() and not all(p.name == SAMPLES or p.match("samples-*.jsonl") for p in folder.iterdir()):
        raise ValueError(f"{folder} holds other things than samples: give --output_dir a folder of its own")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse_place(folder, "folder", error) from error
