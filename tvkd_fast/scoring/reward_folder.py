"""Rewards of a dataset's responses by reward models, in a folder of their own within a folder of scores.

Every model has shards of consecutive pairs. The manifest names those that are whole, with their checksums, and is
written anew after each: a killed run resumes there, and a model's rewards stay where other models are added.

Letters: P pairs, K reward models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tvkd_fast.data import PairDataset
from tvkd_fast.distributed import World
from tvkd_fast.files import read_signed, sha256_of, signed_json, to_disk, whole_files, write_whole

REWARDS = "rewards"
"""The folder within a folder of scores."""
_MANIFEST = "manifest.json"
_FORMAT = 1
_TENSOR = "rewards"


@dataclass(frozen=True)
class RewardShard:
    """One file, of the pairs that follow those of the shard before."""

    file: str
    pairs: int
    sha256: str


@dataclass(frozen=True)
class RewardMember:
    """One model's rewards, and all that they were made of."""

    name: str
    """The last part of the model's name, by which `--data.rewards` asks for it."""
    model: str
    """Its fingerprint."""
    tokens: str
    """The fingerprint of the token ids that it read."""
    precision: str
    shards: tuple[RewardShard, ...] = ()

    @property
    def pairs(self) -> int:
        return sum(shard.pairs for shard in self.shards)

    def same_numbers(self, other: RewardMember) -> bool:
        """Return whether both describe the same rewards, under whatever name, and however many are there."""
        return self.key == other.key

    @property
    def key(self) -> str:
        """What its files are named by."""
        return hashlib.sha256(f"{self.model};{self.tokens};{self.precision}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RewardManifest:
    """The models whose rewards of a dataset are kept, in the order in which they were added."""

    dataset: str
    """The fingerprint of the pairs in the policy's tokens."""
    pairs: int
    members: tuple[RewardMember, ...] = ()
    format: int = _FORMAT

    def text(self) -> str:
        """Return the manifest file's exact text, with a checksum of its own."""
        return signed_json(asdict(self))

    @property
    def names(self) -> list[str]:
        """The names of the models whose rewards are complete."""
        return [member.name for member in self.members if member.pairs == self.pairs]


class RewardReader(Protocol):
    """A reward model, and the dataset in its tokens."""

    def rewards(self, pairs: Sequence[int]) -> Tensor:
        """[P, 2] float32 of the chosen and of the rejected responses of these pairs."""


def read_reward_manifest(folder: str | Path) -> RewardManifest | None:
    """What a folder of scores holds of reward models; None where it holds nothing. ValueError where it is damaged."""
    path = Path(expanduser(folder)) / REWARDS / _MANIFEST
    if not path.exists():
        return None
    return read_signed(path, _made, formats=(_FORMAT,), command="`tvkd score --reward_model`", missing="")


def load_rewards(folder: str | Path, dataset: PairDataset, names: Sequence[str]) -> Tensor:
    """[K, P, 2] float32 rewards of the chosen and the rejected responses by the models of these names.

    Raises ValueError where the folder was made of other data, lacks one of them, or is damaged.
    """
    manifest = read_reward_manifest(folder)
    again = "run `tvkd score --reward_model` again"
    held = [] if manifest is None else manifest.names
    missing = [name for name in names if name not in held]
    if manifest is None or missing:
        raise ValueError(
            f"{folder} holds no rewards of {', '.join(missing)}, only of {', '.join(held) or 'no model'}: add them by "
            "`tvkd score --reward_model` and the other settings as before"
        )
    if manifest.dataset != dataset.fingerprint:
        raise ValueError(f"the rewards at {folder} were made of other data: {again}")
    by_name = {member.name: member for member in manifest.members}
    place = Path(expanduser(folder)) / REWARDS
    found = []
    for name in names:
        shards = by_name[name].shards
        if whole_files(place, shards) != shards:
            raise ValueError(f"a file of {name}'s rewards in {place} does not match its checksum: {again}")
        found.append(torch.cat([load_file(place / shard.file)[_TENSOR] for shard in shards]))
    return torch.stack(found)


def rewards_to_disk(
    dataset: PairDataset,
    readers: Sequence[tuple[RewardMember, RewardReader]],
    folder: str | Path,
    *,
    pairs_per_shard: int,
    world: World,
    progress: bool = False,
) -> RewardManifest:
    """Score the dataset by each reward model into the folder, which the first process writes; what is there of the same
    data and models is not computed again. Raises ValueError for a reward that is no finite number."""
    place = Path(expanduser(folder)) / REWARDS
    manifest = world.broadcast(_kept(place, dataset, [member for member, _ in readers]) if world.first else None)
    assert manifest is not None
    for wanted, reader in readers:
        which = next(i for i, member in enumerate(manifest.members) if member.same_numbers(wanted))
        member = manifest.members[which]
        what, done = f"rewards of {member.name}", member.pairs
        with tqdm(total=len(dataset), initial=done, desc=what, unit="pair", disable=not progress) as bar:
            for first in range(member.pairs, len(dataset), pairs_per_shard):
                pairs = range(first, min(first + pairs_per_shard, len(dataset)))
                rewards = _of_all(reader, pairs, world)
                _check_finite(rewards, pairs, dataset, member.name)
                if world.first:
                    shard = _write(place, f"{member.key}-{first:09d}.safetensors", rewards)
                    member = replace(member, shards=(*member.shards, shard))
                    members = (*manifest.members[:which], member, *manifest.members[which + 1 :])
                    manifest = replace(manifest, members=members)
                    write_whole(place / _MANIFEST, manifest.text())
                bar.update(len(pairs))
    return world.broadcast(manifest if world.first else None) or manifest


def _kept(place: Path, dataset: PairDataset, wanted: Sequence[RewardMember]) -> RewardManifest:
    """What is there of the same dataset, with the wanted models behind it that are not."""
    try:
        found = read_reward_manifest(place.parent)
    except ValueError:
        found = None
    if found is None or found.dataset != dataset.fingerprint:
        found = RewardManifest(dataset.fingerprint, len(dataset))
    members = [replace(member, shards=whole_files(place, member.shards)) for member in found.members]
    for one in wanted:
        if not any(one.same_numbers(member) for member in members):
            # Other weights or tokens of the same name take its place.
            members = [member for member in members if member.name != one.name] + [one]
    place.mkdir(parents=True, exist_ok=True)
    named = {_MANIFEST, *(shard.file for member in members for shard in member.shards)}
    for path in place.iterdir():
        if path.name not in named:
            path.unlink()
    return replace(found, members=tuple(members))


def _of_all(reader: RewardReader, pairs: range, world: World) -> Tensor:
    """[P, 2] of the pairs, of which every process scores its part."""
    mine = pairs[world.rank :: world.size]
    gathered = world.all_gather(reader.rewards(mine) if mine else torch.empty(0, 2))
    rewards = torch.empty(len(pairs), 2)
    for rank, part in enumerate(gathered):
        rewards[rank :: world.size] = part
    return rewards


def _check_finite(rewards: Tensor, pairs: range, dataset: PairDataset, name: str) -> None:
    odd = (~rewards.isfinite()).any(1).nonzero().flatten().tolist()
    if odd:
        raise ValueError(
            f"the reward of {dataset[pairs[odd[0]]].row} by {name} is NaN or inf, and of {len(odd)} of these "
            f"{len(pairs)} pairs: try --model.dtype float32, or leave the row out"
        )


def _write(place: Path, file: str, rewards: Tensor) -> RewardShard:
    try:
        save_file({_TENSOR: rewards}, place / file)
        to_disk(place / file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"could not save rewards to {place}: {error}. Free some space and run it again to resume"
        ) from error
    return RewardShard(file, len(rewards), sha256_of(place / file))


def _made(body: dict[str, Any]) -> RewardManifest:
    members = tuple(
        RewardMember(**member | {"shards": tuple(RewardShard(**shard) for shard in member["shards"])})
        for member in body["members"]
    )
    return RewardManifest(**body | {"members": members})
