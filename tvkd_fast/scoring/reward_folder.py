"""Rewards of a dataset's responses by reward models, in a folder of their own within a folder of scores.

Every model has shards of consecutive pairs. The manifest names those that are whole, with their checksums, and is
written anew after each: a killed run resumes there, and a model's rewards stay where other models are added.

Letters: P pairs, K reward models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from tvkd_fast.files import MissingError, read_signed, sha256_of, signed_json, to_disk, whole_files, write_whole

REWARDS = "rewards"
"""The folder within a folder of scores."""
_MANIFEST = "manifest.json"
_FORMAT = 1
_TENSOR = "rewards"
_COMMAND = "`tvkd score --reward_model`"


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
    try:
        return read_signed(path, _made, formats=(_FORMAT,), command=_COMMAND, missing="")
    except MissingError:
        return None


def rewards_may_be_of(folder: str | Path, dataset: str) -> bool:
    """Whether a folder of scores holds rewards of the dataset of this fingerprint, or some that cannot be read."""
    try:
        manifest = read_reward_manifest(folder)
    except ValueError:
        return True
    return manifest is not None and manifest.dataset == dataset


def check_rewards(folder: str | Path, members: Iterable[RewardMember]) -> None:
    """Raise ValueError where a file of these models' rewards is missing or differs from its checksum."""
    place = Path(expanduser(folder)) / REWARDS
    for member in members:
        if whole_files(place, member.shards) != member.shards:
            raise ValueError(
                f"a file of {member.name}'s rewards in {place} does not match its checksum: run {_COMMAND} again"
            )


def load_rewards(folder: str | Path, dataset: PairDataset, names: Sequence[str]) -> Tensor:
    """[K, P, 2] float32 rewards of the chosen and the rejected responses by the models of these names.

    Raises ValueError where the folder was made of other data, lacks one of them, or is damaged.
    """
    manifest = read_reward_manifest(folder)
    held = [] if manifest is None else manifest.names
    missing = [name for name in names if name not in held]
    if manifest is None or missing:
        raise ValueError(
            f"{folder} holds no rewards of {', '.join(missing)}, only of {', '.join(held) or 'no model'}: add them by "
            "`tvkd score --reward_model` and the other settings as before"
        )
    if manifest.dataset != dataset.fingerprint:
        raise ValueError(f"the rewards at {folder} were made of other data: run {_COMMAND} again")
    by_name = {member.name: member for member in manifest.members}
    check_rewards(folder, [by_name[name] for name in names])
    place = Path(expanduser(folder)) / REWARDS
    files = [[place / shard.file for shard in by_name[name].shards] for name in names]
    return torch.stack([torch.cat([load_file(file)[_TENSOR] for file in of_one]) for of_one in files])


def rewards_to_disk(
    dataset: PairDataset,
    readers: Sequence[tuple[RewardMember, Callable[[], RewardReader]]],
    folder: str | Path,
    *,
    pairs_per_shard: int,
    world: World,
    progress: bool = False,
) -> RewardManifest:
    """Score the dataset by each reward model, loaded as its turn comes, into a folder that the first process writes.

    What is there of the same data and models is not computed again, whatever the model was called. Raises ValueError
    for a reward that is no finite number, for one model twice, and where the disk refuses.
    """
    keys = [member.key for member, _ in readers]
    twice = [member.name for member, _ in readers if keys.count(member.key) > 1]
    if twice:
        raise ValueError(f"{' and '.join(twice)} are one model: give --reward_model one of them")
    place = Path(expanduser(folder)) / REWARDS
    manifest = world.broadcast(_kept(place, dataset, [member for member, _ in readers]) if world.first else None)
    assert manifest is not None
    for wanted, load in readers:
        which = next(i for i, member in enumerate(manifest.members) if member.same_numbers(wanted))
        member = manifest.members[which]
        what, done = f"rewards of {member.name}", member.pairs
        reader = load() if done < len(dataset) else None
        with tqdm(total=len(dataset), initial=done, desc=what, unit="pair", disable=not progress) as bar:
            for first in range(member.pairs, len(dataset), pairs_per_shard):
                pairs = range(first, min(first + pairs_per_shard, len(dataset)))
                assert reader is not None
                rewards = _of_all(reader, pairs, world)
                _check_finite(rewards, pairs, dataset, member.name)
                if world.first:
                    with _saving(place):
                        shard = _write(place / f"{member.key}-{first:09d}.safetensors", rewards)
                        member = replace(member, shards=(*member.shards, shard))
                        members = (*manifest.members[:which], member, *manifest.members[which + 1 :])
                        manifest = replace(manifest, members=members)
                        write_whole(place / _MANIFEST, manifest.text())
                bar.update(len(pairs))
        # The next one needs its memory.
        del reader
    return world.broadcast(manifest if world.first else None) or manifest


def _kept(place: Path, dataset: PairDataset, wanted: Sequence[RewardMember]) -> RewardManifest:
    """What is there of the same dataset, under the names that are wanted now, with the wanted models behind it that are
    not. ValueError where what is there cannot be read: it may be rewards that took a pass each."""
    try:
        found = read_reward_manifest(place.parent)
    except ValueError as error:
        raise ValueError(f"{error}. Where that does not help, delete {place} to score anew") from error
    if found is None or found.dataset != dataset.fingerprint:
        found = RewardManifest(dataset.fingerprint, len(dataset))
    names = {one.key: one.name for one in wanted}
    members = [
        replace(member, name=names.get(member.key, member.name), shards=whole_files(place, member.shards))
        for member in found.members
    ]
    # Other weights or tokens of the same name take its place.
    members = [member for member in members if member.key in names or member.name not in names.values()]
    held = {member.key for member in members}
    kept = replace(found, members=(*members, *(one for one in wanted if one.key not in held)))
    named = {_MANIFEST, *(shard.file for member in members for shard in member.shards)}
    with _saving(place):
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / _MANIFEST, kept.text())
        for path in place.iterdir():
            if path.name not in named:
                path.unlink()
    return kept


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


@contextmanager
def _saving(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"could not save rewards to {place}: {error}. Free some space and run it again to resume"
        ) from error


def _write(path: Path, rewards: Tensor) -> RewardShard:
    save_file({_TENSOR: rewards}, path)
    to_disk(path)
    return RewardShard(path.name, len(rewards), sha256_of(path))


def _made(body: dict[str, Any]) -> RewardManifest:
    members = tuple(
        RewardMember(**member | {"shards": tuple(RewardShard(**shard) for shard in member["shards"])})
        for member in body["members"]
    )
    return RewardManifest(**body | {"members": members})
