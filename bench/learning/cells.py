"""The cells of the study: data, a teacher and a warmed student, made once and kept."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench.learning.arms import KAPPA, Potential
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.commands.train import train
from tvkd_fast.data import PairDataset
from tvkd_fast.data.data_config import DataConfig, load_dataset
from tvkd_fast.models import load_model, load_tokenizer
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.scorer import CachedScorer
from tvkd_fast.synthetic.bundled import max_rows, preference_rows
from tvkd_fast.training.final import FINAL, save_final
from tvkd_fast.training.optim import OptimConfig
from tvkd_fast.training.train_config import TrainConfig

MODEL = "smollm2-135m"
MODEL_CONFIG = ModelConfig(threads=1)
SELECTED_FROM = 1200
"""The row of the training file from which on arms are selected; none of them is trained on."""
Data = Literal["screen", "human", "rule"]
Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Budget:
    """The budget of every arm of a cell; `quick` shows that the study runs, its figures mean nothing."""

    train: int
    held_out: int | None
    """Rows; None for all there are."""
    teacher_steps: int = 40
    warm_steps: int = 150
    steps: int = 75
    pairs: int = 4
    max_length: int = 160
    """Tokens of a training pair; a longer prompt is dropped, a longer answer cut."""
    held_out_length: int = 1024
    curve: int = 32
    """Held-out pairs of the learning curve."""


BUDGETS: dict[Data, Budget] = {
    "screen": Budget(train=600, held_out=200, held_out_length=160),
    "human": Budget(train=1200, held_out=256),
    "rule": Budget(train=400, held_out=None),
}
QUICK = Budget(train=12, held_out=8, teacher_steps=1, warm_steps=2, steps=3, curve=4)


@dataclass(frozen=True)
class Cell:
    """A student of so many layers on one of the data sets."""

    data: Data
    layers: int
    out: Path
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.data}, {self.layers} layers"

    @property
    def budget(self) -> Budget:
        return QUICK if self.quick else BUDGETS[self.data]

    @property
    def teacher(self) -> Path:
        return self.out / self.data / "teacher" / FINAL

    @property
    def student(self) -> Path:
        return self.out / self.data / f"student-{self.layers}" / FINAL

    def data_config(self, split: Split) -> DataConfig:
        folder = self.out / self.data
        return DataConfig(
            train=str(folder / "train.jsonl"),
            eval=str(folder / "held_out.jsonl"),
            max_length=self.budget.max_length if split == "train" else self.budget.held_out_length,
            bad_pairs="drop",
            overlong="drop",
        )

    def dataset(self, split: Split) -> PairDataset:
        which = "train" if split == "train" else "eval"
        return load_dataset(which, self.data_config(split), load_tokenizer(self.student))

    def reference(self, split: Split) -> CachedScorer:
        return self._scores(f"reference-{self.layers}-{split}", split)

    def potential(self, kind: Potential) -> CachedScorer:
        """Return the teacher's potential of the training pairs, whose tokens are the same for every student."""
        return self._scores(kind, "train")

    def _scores(self, name: str, split: Split) -> CachedScorer:
        return CachedScorer(ScoreCache.load(str(self.out / self.data / name), self.dataset(split)))


def write_data(out: Path, data: Data, quick: bool, train_file: Path, eval_file: Path) -> None:
    """Human preferences: the first rows to train on; to screen, rows from 1200 on are held out, then the other file.

    By rule: the bundled set, whose questions of its training split are in none of its evaluation split, so that one is
    trained on and the other, which is larger, held out.
    """
    budget = QUICK if quick else BUDGETS[data]
    if data == "rule":
        rows = preference_rows("eval", max_rows("eval"))
        held_out = preference_rows("train", budget.held_out or max_rows("train"))
    else:
        rows = _lines(train_file)
        held_out = rows[SELECTED_FROM:] if data == "screen" else _lines(eval_file)
    found = {"train": rows[: budget.train], "held_out": held_out[: budget.held_out]}
    (out / data).mkdir(parents=True, exist_ok=True)
    for split, of_split in found.items():
        (out / data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))


def _lines(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt") as lines:
        return [json.loads(line) for line in lines]


def make_base(out: Path) -> None:
    if not (out / "base" / FINAL).exists():
        save_final(load_model(MODEL), None, load_tokenizer(MODEL), out / "base" / FINAL)


def make_teacher(cell: Cell) -> None:
    """The whole model, by DPO on the training pairs."""
    _train(cell, cell.teacher, objective="dpo", max_steps=cell.budget.teacher_steps, lr=1e-5)


def make_student(cell: Cell) -> None:
    """Some of its layers, warmed on the chosen responses."""
    _train(cell, cell.student, objective="sft", max_steps=cell.budget.warm_steps, lr=1e-3, layers=cell.layers)


def make_reference_scores(cell: Cell, split: Split) -> None:
    """The student's log-probabilities before it is trained."""
    _score(cell, f"reference-{cell.layers}-{split}", split)


def make_potential(cell: Cell, kind: Potential) -> None:
    """The teacher's numbers of the training pairs, in sums or in rewards over what it was before DPO."""
    changes: dict[str, Any] = {"teacher": str(cell.teacher), "kappa": KAPPA if kind == "sums" else 1.0}
    if kind == "rewards":
        changes["teacher_reference"] = str(cell.out / "base" / FINAL)
    _score(cell, kind, "train", **changes)


def _train(cell: Cell, folder: Path, *, objective: Any, max_steps: int, lr: float, layers: int | None = None) -> None:
    if folder.exists():
        return
    config = TrainConfig(
        policy=str(cell.out / "base" / FINAL),
        output_dir=str(folder.parent),
        objective=objective,
        student_layers=layers,
        data=replace(cell.data_config("train"), eval=None),
        optim=OptimConfig(lr=lr, warmup_steps=max_steps // 10),
        model=MODEL_CONFIG,
        max_steps=max_steps,
        pairs_per_step=cell.budget.pairs,
        save_every=-1,
    )
    train(config, show_progress=False)


def _score(cell: Cell, name: str, split: Split, **changes: Any) -> None:
    folder = cell.out / cell.data / name
    if (folder / "manifest.json").exists():
        return
    config = ScoreConfig(
        output_dir=str(folder),
        policy=str(cell.student),
        which="train" if split == "train" else "eval",
        data=cell.data_config(split),
        model=MODEL_CONFIG,
        pairs_per_shard=128,
        **changes,
    )
    score(config, show_progress=False)
