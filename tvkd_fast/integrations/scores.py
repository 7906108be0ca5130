"""A teacher's shaping returns from folders that `tvkd score` wrote, for data that another trainer tokenized.

Letters: P pairs, M response states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from os import PathLike
from os.path import expanduser
from pathlib import Path

import torch
from torch import Tensor

from tvkd_fast.data import PairDataset, TokenizedPair, TokenReport, collate_pairs
from tvkd_fast.integrations.teacher import ShapingSettings
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.manifest import MANIFEST, ScoreManifest, read_manifest
from tvkd_fast.scoring.score_pairs import first_difference

AT_ONCE = 256
"""Pairs that are looked up together."""

_IN_WORDS = {"reward": "rewards", "lse": "sums", "teacher_logps": "log-probabilities"}


def is_score_folder(name: str | PathLike[str]) -> bool:
    """Return whether it is a folder that `tvkd score` wrote, and no model."""
    return (Path(expanduser(name)) / MANIFEST).is_file()


def numbers_of(manifest: ScoreManifest) -> tuple[str, ...]:
    """Return the names of what a folder holds of its teacher, which format 3 said by its fingerprints alone."""
    if manifest.numbers is not None:
        return manifest.numbers
    return ("lse",) if manifest.teacher_reference is None else ("reward",)


class CachedReturns:
    """Ψ of datasets, each from the folder that was made of its tokens; without settings the teacher's log-probabilities
    of their responses, which are of the policy's tokens then."""

    def __init__(self, folders: Sequence[str], settings: ShapingSettings | None) -> None:
        self.settings, self.folders = settings, list(folders)
        self.manifests = [read_manifest(folder) for folder in folders]
        for folder, manifest in zip(folders, self.manifests, strict=True):
            numbers = numbers_of(manifest)
            if manifest.teacher is None:
                raise ValueError(f"{folder} holds no teacher's numbers: run `tvkd score --teacher …`")
            if settings is None:
                _check_log_probabilities(folder, manifest)
                continue
            rewards = settings.value_from == "implicit_reward"
            if ("reward" if rewards else "lse") not in numbers:
                held = " and ".join(text for name, text in _IN_WORDS.items() if name in numbers)
                raise ValueError(
                    f"{folder} holds a teacher's {held}, which value_from={settings.value_from!r} is not made of: run "
                    "`tvkd score` with --teacher_reference for 'implicit_reward', without it for the others"
                )
            if not rewards and manifest.kappa != settings.kappa:
                raise ValueError(
                    f"{folder} was made with kappa={manifest.kappa:g}, not {settings.kappa:g}: set kappa, or run `tvkd "
                    f"score --kappa {settings.kappa:g}`"
                )

        for (one, first), (other, second) in combinations(zip(folders, self.manifests, strict=True), 2):
            if first.dataset == second.dataset:
                raise ValueError(f"{one} and {other} were made of the same pairs: give one of them")
            if (first.teacher, first.teacher_reference) != (second.teacher, second.teacher_reference):
                raise ValueError(f"{one} and {other} are of two teachers: run `tvkd score` with one of them")

    @property
    def made_of(self) -> tuple[object, ...]:
        """Everything but a row's tokens that determines its Ψ: the teacher, how it read them, and the settings."""
        first = self.manifests[0]
        made = sorted((m.dataset, m.teacher_tokens or "", m.precision, m.value_dtype) for m in self.manifests)
        return first.teacher, first.teacher_reference, made, self.settings

    def of(self, pairs: Iterable[TokenizedPair]) -> tuple[Tensor, Tensor]:
        """(P,) each, of chosen and of rejected responses. ValueError where no folder was made of these tokens."""
        dataset = PairDataset(pairs, TokenReport("", 0, 0, "keep_start"))
        made = [manifest.dataset == dataset.fingerprint for manifest in self.manifests]
        if not any(made):
            where = first_difference(self.folders, dataset)
            raise ValueError(
                f"none of {', '.join(self.folders)} was made of these {len(dataset):,} pairs in these tokens"
                f"{where and f' ({where})'}: run "
                "`tvkd score` with the same data, tokenizer and max_length (`--which eval` for evaluation data), give "
                "every dataset's folder, or the teacher itself"
            )
        cache = ScoreCache.load(self.folders[made.index(True)], dataset)
        found = [
            self._of(cache, dataset, range(i, min(i + AT_ONCE, len(dataset)))) for i in range(0, len(dataset), AT_ONCE)
        ]
        chosen, rejected = torch.cat(found, 1)
        return chosen, rejected

    def _of(self, cache: ScoreCache, dataset: PairDataset, places: range) -> Tensor:
        """[2, P]."""
        batch = collate_pairs(dataset[places.start : places.stop], places)
        scores, settings = cache.of(batch.pairs, kinds=()), self.settings
        if settings is None:
            assert scores.teacher_logps is not None
            return scores.teacher_logps.view(2, -1)
        if settings.value_from == "implicit_reward":
            assert scores.reward is not None
            values = settings.value_scale * scores.reward
        else:
            assert scores.lse is not None
            assert scores.lse_kappa is not None
            values = settings.values(scores.lse, scores.lse_kappa)
        return settings.returns(values, *scores.boundaries(batch)).view(2, -1)


def _check_log_probabilities(folder: str, manifest: ScoreManifest) -> None:
    if "teacher_logps" not in numbers_of(manifest):
        raise ValueError(
            f"{folder} holds no log-probabilities of its teacher: add them by `tvkd score --output_dir {folder} "
            "--keep [logps]` and the other settings as before"
        )
    if manifest.teacher_tokens != manifest.dataset:
        raise ValueError(
            f"{folder} is of a teacher with tokens of its own, of which its log-probabilities are: `tvkd train` "
            "takes it, TVKDTrainer only for TVKD's own loss"
        )
