"""The score cache: the numbers of teacher and reference for a dataset, as a folder of shards and a manifest.

A shard holds the numbers of consecutive pairs; the manifest names the shards that are whole, with their checksums, and
what the numbers were made of. It is written anew after each shard, so that a killed run resumes there.

Letters: P pairs, M response states; responses are stored pair by pair, chosen then rejected.
"""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import pairwise, takewhile
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tvkd_fast.data.dataset import PairDataset
from tvkd_fast.data.tokenization import TokenizedPair
from tvkd_fast.files import (
    MissingError,
    is_whole,
    put_back,
    put_in_place,
    refuse_place,
    sha256_of,
    to_disk,
    unfinished,
    whole_files,
    write_whole,
)
from tvkd_fast.scoring.kinds import TOKEN_KINDS, token_kinds
from tvkd_fast.scoring.layout import NAMES, RESPONSE_NAMES, STATE_NAMES, ScoreLayout, Scores, in_order, states_of
from tvkd_fast.scoring.manifest import MANIFEST, Part, ScoreManifest, Shard, read_manifest
from tvkd_fast.scoring.reward_folder import REWARDS, check_rewards, read_reward_manifest, rewards_may_be_of
from tvkd_fast.scoring.token_codec import Codec, Rows
from tvkd_fast.scoring.token_files import HEAD, PATTERNS, TokenFiles, link_parts, read_tokens, token_bytes, write_tokens
from tvkd_fast.transfer import to_device

DIGESTS = "pair_digests"
"""The name of `PairDataset.pair_digests` of the pairs in a shard; shards of older versions have none."""

OF_MODELS = ("teacher", "teacher_reference", "reference")
"""Fields of a manifest that are fingerprints of models."""


class ScoreCache:
    """Scores of a dataset that can be asked for by pair. Its shards are mapped, and read where they are asked for."""

    def __init__(
        self,
        manifest: ScoreManifest,
        pieces: Sequence[Scores],
        layout: ScoreLayout,
        tokens: TokenFiles | None = None,
    ) -> None:
        self.manifest, self.pieces, self.layout, self.tokens = manifest, list(pieces), layout, tokens
        self._firsts = [0]
        for piece in self.pieces:
            assert piece.ref_logps is not None
            self._firsts.append(self._firsts[-1] + piece.ref_logps.shape[0])

    def of(
        self,
        pairs: Tensor,
        device: torch.device | str = "cpu",
        *,
        sides: Sequence[int] = (0, 1),
        kinds: Collection[str] | None = None,
    ) -> Scores:
        """The scores of `pairs` (P,), laid out as a `PairBatch` of these sides lays out its responses.

        `kinds` of "states", "topk" and "sampled" are read of what is kept per token; all that there are where None.
        """
        kept = [name for name in NAMES if getattr(self.pieces[0], name) is not None]
        # An empty micro-batch has numbers too, none of each kind.
        found = {name: [getattr(self.pieces[0], name).flatten()[:0]] for name in kept}
        spans = []
        for response in self.layout.responses(pairs.cpu(), sides).tolist():
            which = bisect_right(self._firsts, response // 2) - 1
            piece, first = self.pieces[which], 2 * self._firsts[which]
            start, end = (int(self.layout.bounds[r] - self.layout.bounds[first]) for r in (response, response + 1))
            # A response has a token less than states.
            spans.append((which, start - (response - first), end - (response - first) - 1))
            for name in kept:
                numbers, place = getattr(piece, name).flatten(), slice(start, end)
                if name in RESPONSE_NAMES:
                    place = slice(response - first, response - first + 1)
                found[name].append(numbers[place])
        whole: dict[str, Any] = {name: to_device(torch.cat(parts), device) for name, parts in found.items()}
        whole = {name: x.float() if x.is_floating_point() else x for name, x in whole.items()}
        scores = Scores(**whole)
        if self.tokens is None:
            return scores
        return replace(scores, **self.tokens.of(spans, torch.device(device), TOKEN_KINDS if kinds is None else kinds))

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of what it holds."""
        held = [name for name in NAMES if getattr(self.pieces[0], name) is not None]
        return in_order([*held, *token_kinds(self.manifest.numbers or ())])

    def between(self, first: int, last: int) -> Scores:
        """The numbers of responses and states of the pairs first..last−1, laid out as in a dataset."""
        found = {name: [getattr(self.pieces[0], name)[:0]] for name in self.numbers if name in NAMES}
        for piece, start in zip(self.pieces, self._firsts, strict=False):
            for name, parts in found.items():
                x, of_pairs = getattr(piece, name), (max(first - start, 0), max(last - start, 0))
                low, high = of_pairs
                if name in STATE_NAMES:
                    low, high = (
                        self.layout.between(start, min(start + place, self.layout.num_pairs)) for place in of_pairs
                    )
                parts.append(x[low:high])
        whole: dict[str, Any] = {name: torch.cat(parts) for name, parts in found.items()}
        return Scores(**whole)

    @classmethod
    def load(cls, folder: str | Path, dataset: Sequence[TokenizedPair]) -> ScoreCache:
        """Map a folder that a `ScoreWriter` finished, for the dataset it was made of.

        Raises ValueError, with the file's name, where it is not whole: every byte is tested against a checksum.
        """
        folder = Path(expanduser(folder))
        manifest = read_manifest(folder)
        if isinstance(dataset, PairDataset) and dataset.fingerprint != manifest.dataset:
            raise ValueError(f"{folder} was made of other data: run `tvkd score` again")
        pieces = [_read_shard(folder / shard.file, shard, manifest) for shard in manifest.shards]
        layout = ScoreLayout(_teacher_states(pieces, states_of(dataset)))
        if (manifest.pairs, manifest.states) != (len(dataset), layout.num_states):
            raise ValueError(
                f"{folder} holds {manifest.pairs} pairs and {manifest.states} states, the data {len(dataset)} and "
                f"{layout.num_states}: it was made of other data; run `tvkd score` again"
            )
        cache = cls(manifest, pieces, layout, read_tokens(folder, manifest))
        for shard, (first, last) in zip(manifest.shards, pairwise(cache._firsts), strict=True):
            if layout.between(first, last) != shard.states:
                raise ValueError(f"{folder / shard.file} holds other pairs than the data: run `tvkd score` again")
        return cache

    def check(self, **expected: str | float | None) -> None:
        """Refuse a cache of something else: every given manifest field must be equal; None is not compared."""
        known = {f.name for f in fields(ScoreManifest)}
        for name, value in expected.items():
            assert name in known
            found = getattr(self.manifest, name)
            if value is None:
                continue
            if name in OF_MODELS and found is not None and _kind(found) != _kind(value):
                raise ValueError(
                    f"whether the score cache is of this run's {name} cannot be determined: it was written by an older "
                    "version, whose fingerprints hold neither a model's config nor the adapter that it came with; run "
                    "`tvkd score` again"
                )
            if found != value:
                raise ValueError(
                    f"the score cache was made with another {name} ({short(found)}, wanted {short(value)}): run "
                    "`tvkd score` again with this run's settings, or give --scores the folder that belongs to it"
                )


class ScoreWriter:
    """Writes a cache shard by shard beside `folder`, whose place it takes once the last shard is whole.

    It resumes from a killed run's files for the same numbers: whole shards are kept, a torn one and those after it
    are computed again. An older cache in `folder` stands until then. The head of states is written first, by
    `write_head` into the folder that it is given, unless the killed run did.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: ScoreManifest,
        layout: ScoreLayout,
        digests: Sequence[int] = (),
        write_head: Callable[[Path], Part] | None = None,
    ) -> None:
        self.folder, self.layout, self.digests = Path(expanduser(folder)), layout, digests
        check_score_folder(self.folder)
        self.partial = unfinished(self.folder)
        self.manifest = self._resumed(manifest)
        self.pairs = sum(shard.pairs for shard in self.manifest.shards)
        self._drop_unnamed()
        if write_head is not None and self.manifest.head is None:
            with self._saving():
                self.manifest = replace(self.manifest, head=write_head(self.partial))
                write_whole(self.partial / MANIFEST, self.manifest.text())

    def _resumed(self, manifest: ScoreManifest) -> ScoreManifest:
        try:
            found = read_manifest(self.partial, finished=False)
        except MissingError:
            return manifest
        except ValueError as error:
            raise ValueError(f"{error}. Where that does not help, delete {self.partial} to score anew") from error
        if not found.same_numbers(manifest) or not (found.head is None or is_whole(self.partial, found.head)):
            return manifest
        shards = takewhile(
            lambda shard: all(is_whole(self.partial, part) for part in shard.beside),
            whole_files(self.partial, found.shards),
        )
        return replace(manifest, shards=tuple(shards), head=found.head)

    def write(
        self,
        scores: Scores,
        tokens: Mapping[str, tuple[Codec, Rows]] | None = None,
        linked: tuple[Path, Sequence[Part]] | None = None,
    ) -> None:
        """The next shard: numbers, what is kept of its tokens, and files of it that another folder has already.

        Raises ValueError where the disk refuses; the shards before it are kept.
        """
        assert scores.ref_logps is not None
        tensors = {name: x for name in NAMES if (x := getattr(scores, name)) is not None}
        if self.manifest.kappa == 1.0:
            tensors.pop("lse_kappa", None)
        dtype = getattr(torch, self.manifest.value_dtype)
        count, place = scores.ref_logps.shape[0], len(self.manifest.shards)
        if self.digests:
            tensors[DIGESTS] = torch.tensor(self.digests[self.pairs : self.pairs + count])
        path = self.partial / f"scores-{place:05d}.safetensors"
        with self._saving():
            save_file({k: x.to(dtype) if k in STATE_NAMES else x for k, x in tensors.items()}, path)
            to_disk(path)
            beside = write_tokens(self.partial, place, tokens or {}, self.manifest.head)
            if linked is not None:
                beside += link_parts(linked[0], self.partial, linked[1])
            states = self.layout.between(self.pairs, self.pairs + count)
            shard = Shard(path.name, count, states, sha256_of(path), beside)
            self.manifest = replace(self.manifest, shards=(*self.manifest.shards, shard))
            self.pairs += count
            write_whole(self.partial / MANIFEST, self.manifest.text())

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            yield
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"could not save scores to {self.partial}: {error}. Free some space and run it again to resume at "
                f"pair {self.pairs:,} of {self.manifest.pairs:,}"
            ) from error

    def _drop_unnamed(self) -> None:
        """Torn shards, and those of another pass."""
        names = {MANIFEST, *(part.file for part in (self.manifest.head,) if part is not None)}
        for shard in self.manifest.shards:
            names |= {shard.file, *(part.file for part in shard.beside)}
        for path in self.partial.glob("*"):
            if path.name not in names and path.is_file():
                path.unlink()

    def finish(self) -> None:
        """Put the whole cache in its place, with the rewards of the same data that are there."""
        assert self.manifest.finished
        shutil.rmtree(self.partial / REWARDS, ignore_errors=True)
        if rewards_may_be_of(self.folder, self.manifest.dataset):
            with self._saving():
                shutil.copytree(self.folder / REWARDS, self.partial / REWARDS, copy_function=_copied)
        put_in_place(self.folder, "scores")


def describe(folder: str | Path) -> str:
    """Return a description of a cache: its sources, size and the numbers' ranges. Checks every shard."""
    folder = Path(expanduser(folder))
    manifest = read_manifest(folder)
    pieces = [_read_shard(folder / shard.file, shard, manifest) for shard in manifest.shards]
    read_tokens(folder, manifest)
    of_tokens = token_bytes(folder, manifest)
    size = sum((folder / shard.file).stat().st_size for shard in manifest.shards) + sum(of_tokens.values())
    made_of = ("dataset", "tokenizer", "reference", "teacher", "teacher_reference", "teacher_tokens")
    lines = {name: value for name in made_of if (value := getattr(manifest, name)) is not None}
    lines["precision"] = f"{manifest.precision}; what is kept a state is in {manifest.value_dtype}"
    lines["kappa"] = str(manifest.kappa)
    lines["size"] = (
        f"{manifest.pairs:,} pairs, {manifest.states:,} response states, {len(manifest.shards):,} shards, "
        f"{size:,} bytes"
    )
    lines["bytes a token"] = ", ".join(_bytes_per_token(manifest, pieces, of_tokens))
    if manifest.head is not None:
        rotated = "" if manifest.rotation is None else ", after a rotation that their head has as well"
        lines["states"] = f"in {manifest.states_dtype}{rotated}; the head has {(folder / HEAD).stat().st_size:,} bytes"
    lines["made by"] = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    for name, what in (
        ("ref_logps", "reference logps"),
        ("teacher_logps", "teacher's logps"),
        ("lse", "LSE(z)"),
        ("lse_kappa", "LSE(kappa z)"),
        ("reward", "teacher's reward"),
    ):
        found = [x for piece in pieces if (x := getattr(piece, name)) is not None]
        if found and (name != "lse_kappa" or manifest.kappa != 1.0):
            x = torch.cat([part.flatten() for part in found]).double()
            lines[what] = (
                f"{float(x.mean()):.3f} ± {float(x.std()):.3f} nats, {float(x.min()):.3f} … {float(x.max()):.3f}"
            )
    rewards = read_reward_manifest(folder)
    if rewards is not None:
        check_rewards(folder, rewards.members)
        lines["rewards"] = ", ".join(f"{one.name} of {one.pairs:,} pairs" for one in rewards.members)
    return "\n".join(f"{name:<18}{text}" for name, text in lines.items())


def _bytes_per_token(manifest: ScoreManifest, pieces: Sequence[Scores], of_tokens: Mapping[str, int]) -> Iterator[str]:
    """Each kind of number with its bytes per response token of the policy."""
    tokens = max(sum(shard.states - 2 * shard.pairs for shard in manifest.shards), 1)
    for name in NAMES:
        found = [x for piece in pieces if (x := getattr(piece, name)) is not None]
        if found and (name != "lse_kappa" or manifest.kappa != 1.0):
            yield f"{name} {sum(x.nbytes for x in found) / tokens:.1f}"
    for name, size in of_tokens.items():
        yield f"{name} {size / tokens:,.1f}"


def _read_shard(path: Path, shard: Shard, manifest: ScoreManifest) -> Scores:
    try:
        if sha256_of(path) != shard.sha256:
            raise ValueError(f"{path} does not match its checksum: it is damaged; run `tvkd score` again")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); run `tvkd score` again") from error
    scores = Scores(**{name: tensors.get(name, tensors.get("lse") if name == "lse_kappa" else None) for name in NAMES})
    shapes = {
        "ref_logps": (shard.pairs, 2),
        "teacher_states": (shard.pairs, 2),
        "teacher_ended": (shard.pairs, 2),
        "teacher_logps": (shard.pairs, 2),
        **dict.fromkeys(STATE_NAMES, (shard.states,)),
    }
    fits = all(x is None or x.shape == shapes[name] for name, x in vars(scores).items())
    own = {scores.teacher_states is not None, scores.teacher_ended is not None}
    if not fits or scores.ref_logps is None or own != {manifest.own_tokens}:
        raise ValueError(f"{path} does not match {MANIFEST}; run `tvkd score` again")
    return scores


def _teacher_states(pieces: Sequence[Scores], otherwise: Tensor) -> Tensor:
    """[P, 2] states of the responses in the teacher's own tokens, if it has some."""
    found = [x for piece in pieces if (x := piece.teacher_states) is not None]
    return torch.cat(found) if found else otherwise


def check_score_folder(folder: Path) -> None:
    """Raise ValueError where scores cannot be written there, or something else would have to give way to them. Scores
    that a kill left aside, as others were to take their place, are there again."""
    try:
        put_back(folder)
    except OSError as error:
        raise refuse_place(folder, "folder", error) from error
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give --output_dir a folder of its own")
    if folder.exists() and not _only_scores(folder):
        raise ValueError(f"{folder} holds other things than scores: give --output_dir a folder of its own")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished(folder).mkdir(exist_ok=True)
    except OSError as error:
        raise refuse_place(folder, "folder", error) from error


def _copied(source: str, target: str) -> None:
    shutil.copy2(source, target)
    to_disk(Path(target))


def _only_scores(folder: Path) -> bool:
    patterns = (MANIFEST, REWARDS, "scores*.safetensors", *PATTERNS)
    return all(any(path.match(pattern) for pattern in patterns) for path in folder.iterdir())


def _kind(fingerprint: object) -> str:
    """Return the prefix of a fingerprint's digest, which names what it covers; empty for weights alone."""
    return str(fingerprint).rpartition(":")[0]


def short(value: object) -> str:
    """Return a field of a manifest as an error names it: of a fingerprint the first digits."""
    text = str(value).rpartition(":")[2]
    return f"{text[:12]}…" if isinstance(value, str) and len(text) > 12 else str(value)
