"""The files of a score folder with a row per response token: one of each kind a shard, and the head of states.

Letters: N response tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tvkd_fast.files import sha256_of, to_disk
from tvkd_fast.ops import Head
from tvkd_fast.scoring.kinds import TOKEN_KINDS, count_of, kind_of, token_kinds
from tvkd_fast.scoring.manifest import Part, ScoreManifest, Shard
from tvkd_fast.scoring.token_codec import Codec, Rows, codec_of
from tvkd_fast.transfer import to_device

HEAD = "teacher_head.safetensors"
PATTERNS = ("states-*.safetensors", "topk*.safetensors", "sampled*.safetensors", HEAD)
"""The names of these files."""
_OF_HEAD = "head"
"""The metadata of a file of states: the checksum of the head that belongs to them."""


class TokenFiles:
    """What a folder keeps of tokens, by kind, mapped; its rows can be asked for shard by shard."""

    def __init__(self, codecs: Mapping[str, Codec], shards: Sequence[Mapping[str, Rows]], head: Head | None) -> None:
        self.codecs, self.shards, self.head = codecs, shards, head
        self._heads: dict[torch.device, Head] = {}

    def of(
        self, spans: Iterable[tuple[int, int, int]], device: torch.device, kinds: Collection[str] = TOKEN_KINDS
    ) -> dict[str, Any]:
        """The tensors of `Scores` by name that these kinds are, of rows start..end−1 of a shard for each span (shard,
        start, end).

        They are decoded on the device; states have the dtype of their head.
        """
        found: dict[str, Any] = {}
        # An empty micro-batch has rows too, none of each kind.
        spans = [(0, 0, 0), *spans]
        for name, codec in self.codecs.items():
            if kind_of(name) not in kinds:
                continue
            parts = [codec.rows(self.shards[shard][name], start, end) for shard, start, end in spans]
            rows = {key: to_device(torch.cat([part[key] for part in parts]), device) for key in parts[0]}
            found |= codec.decode(rows)
        if self.head is not None and "teacher_hidden" in found:
            if device not in self._heads:
                self._heads[device] = _moved(self.head, device)
            head = self._heads[device]
            found |= {"teacher_head": head, "teacher_hidden": found["teacher_hidden"].to(head.weight.dtype)}
        return found


def write_tokens(
    folder: Path, place: int, kinds: Mapping[str, tuple[Codec, Rows]], head: Part | None
) -> tuple[Part, ...]:
    """Write one shard's rows of each kind. Raises OSError or SafetensorError where the disk refuses."""
    parts = []
    for name, (codec, rows) in kinds.items():
        path = folder / file_of(name, place)
        metadata = {_OF_HEAD: head.sha256} if head is not None and name == "states" else None
        save_file({key: x.contiguous() for key, x in codec.packed(rows).items()}, path, metadata)
        to_disk(path)
        parts.append(Part(path.name, sha256_of(path)))
    return tuple(parts)


def file_of(name: str, place: int) -> str:
    """The file of a kind in the shard of this number."""
    return f"{name.replace(':', '')}-{place:05d}.safetensors"


def link_parts(source: Path, target: Path, parts: Iterable[Part]) -> tuple[Part, ...]:
    """Give a folder the files of another: the same on disk where it can be, copies elsewhere."""
    parts = tuple(parts)
    for part in parts:
        (target / part.file).unlink(missing_ok=True)
        try:
            os.link(source / part.file, target / part.file)
        except OSError:
            shutil.copy2(source / part.file, target / part.file)
            to_disk(target / part.file)
    return parts


def write_head(folder: Path, head: Head) -> Part:
    tensors = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
    transforms = {"softcap": head.softcap, "logit_scale": head.logit_scale}
    path = folder / HEAD
    save_file(
        {name: x.detach().cpu().contiguous() for name, x in tensors.items()}, path, {_OF_HEAD: json.dumps(transforms)}
    )
    to_disk(path)
    return Part(path.name, sha256_of(path))


def read_tokens(folder: Path, manifest: ScoreManifest) -> TokenFiles | None:
    """Map what the manifest names, every byte tested; None where it names none. ValueError with the file's name."""
    kinds = token_kinds(manifest.numbers or ())
    if not kinds:
        return None
    head = None
    if "states" in kinds:
        if manifest.head is None or manifest.states_dtype is None:
            raise ValueError(f"{folder} names states and no head of theirs: run `tvkd score` again")
        head = _read_head(folder, manifest.head)
    codecs = {name: codec_of(name, manifest.states_dtype, 0) for name in kinds}
    shards = [
        {name: _read_rows(folder, file_of(name, i), shard, manifest, codec) for name, codec in codecs.items()}
        for i, shard in enumerate(manifest.shards)
    ]
    files = TokenFiles(codecs, shards, head)
    _check_shapes(folder, manifest, files)
    return files


def token_bytes(folder: Path, manifest: ScoreManifest) -> dict[str, int]:
    """Bytes of the files of each kind."""
    return {
        name: sum((folder / file_of(name, i)).stat().st_size for i in range(len(manifest.shards)))
        for name in token_kinds(manifest.numbers or ())
    }


def _read_rows(folder: Path, file: str, shard: Shard, manifest: ScoreManifest, codec: Codec) -> Rows:
    part = next((part for part in shard.beside if part.file == file), None)
    if part is None:
        raise ValueError(f"{folder / file} is not in the manifest of {shard.file}: run `tvkd score` again")
    tensors, metadata = _read(folder / file, part)
    if file.startswith("states") and manifest.head is not None and metadata.get(_OF_HEAD) != manifest.head.sha256:
        raise ValueError(
            f"{folder / file} holds states of another head than {folder / manifest.head.file}, and their product would "
            "be no logits: run `tvkd score` again"
        )
    try:
        return codec.opened(tensors)
    except KeyError as error:
        raise ValueError(f"{folder / file} has no {error}: run `tvkd score` again") from error


def _check_shapes(folder: Path, manifest: ScoreManifest, files: TokenFiles) -> None:
    for i, (shard, kinds) in enumerate(zip(manifest.shards, files.shards, strict=True)):
        for name, rows in kinds.items():
            tokens, k = shard.states - 2 * shard.pairs, None if name == "states" else count_of(name)
            wanted: dict[str, tuple[int, ...]] = {}
            if files.head is not None and name == "states":
                wanted = {"states": (tokens, files.head.weight.shape[1]), "scales": (tokens,)}
                wanted = wanted if manifest.states_dtype == "int8" else {"states": wanted["states"]}
            elif kind_of(name) == "topk":
                assert k is not None
                wanted = {"ids": (tokens, k), "logps": (tokens, k), "tail": (tokens,)}
            elif kind_of(name) == "sampled":
                drawn = int(rows["distinct"].sum())
                wanted = {"ids": (drawn,), "counts": (drawn,), "distinct": (tokens,)}
                wanted["firsts"] = tuple(rows["firsts"].shape)
            if {key: tuple(x.shape) for key, x in rows.items()} != wanted:
                raise ValueError(f"{folder / file_of(name, i)} does not match the manifest: run `tvkd score` again")


def _read(path: Path, part: Part) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        if sha256_of(path) != part.sha256:
            raise ValueError(f"{path} does not match its checksum: it is damaged; run `tvkd score` again")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); run `tvkd score` again") from error


def _read_head(folder: Path, part: Part) -> Head:
    tensors, metadata = _read(folder / part.file, part)
    try:
        return Head(tensors["weight"], tensors.get("bias"), **json.loads(metadata[_OF_HEAD]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / part.file} is no head ({error}): run `tvkd score` again") from error


def _moved(head: Head, device: torch.device) -> Head:
    bias = None if head.bias is None else to_device(head.bias, device)
    return replace(head, weight=to_device(head.weight, device), bias=bias)
