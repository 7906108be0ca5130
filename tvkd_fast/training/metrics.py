"""The reports of a run: metrics.jsonl, TensorBoard where it is installed, and the progress bar."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tvkd_fast.data import PairBatch
from tvkd_fast.distributed import World
from tvkd_fast.evaluation.evaluate import shaping_metrics
from tvkd_fast.files import written
from tvkd_fast.losses import shaping_report
from tvkd_fast.objectives import ObjectiveOutput
from tvkd_fast.training.step import StepOutput


class Interval:
    """The outputs of the steps since the last line of metrics, kept on the device until they are read."""

    def __init__(self) -> None:
        self._steps: list[StepOutput] = []
        self._counts = torch.zeros(3, dtype=torch.int64)

    def add(self, out: StepOutput, batches: Sequence[PairBatch], *, capacity: int) -> None:
        """Add one step: its output, this process's batches, and the tokens that these can hold."""
        self._steps.append(out)
        tokens, responses = sum(b.num_tokens for b in batches), sum(b.labels.numel() for b in batches)
        self._counts += torch.tensor([tokens, responses, capacity])

    def read(self, world: World) -> IntervalNumbers:
        """Waits for the device, and for the other processes; then begins anew."""
        flags = torch.stack([out.finite for out in self._steps]).tolist() if self._steps else []
        taken = [out for out, finite in zip(self._steps, flags, strict=True) if finite]
        columns = [
            compared_pairs(output, lengths).cpu()
            for out in taken
            for output, lengths in zip(out.outputs, out.length_differences, strict=True)
        ]
        mine = torch.cat(columns, 1) if columns else torch.zeros(5, 0, dtype=torch.float64)
        gathered = world.all_gather((mine, self._counts))
        tokens, response_tokens, capacity = torch.stack([counts for _, counts in gathered]).sum(0).tolist()
        found = IntervalNumbers(
            losses=torch.stack([out.loss for out in taken]).tolist() if taken else [],
            grad_norms=torch.stack([out.grad_norm for out in taken]).tolist() if taken else [],
            skipped=len(self._steps) - len(taken),
            baselines=[float(out.baseline) for out in taken if out.baseline is not None],
            pairs=torch.cat([numbers for numbers, _ in gathered], 1),
            tokens=tokens,
            response_tokens=response_tokens,
            capacity=capacity,
        )
        self._steps, self._counts = [], torch.zeros_like(self._counts)
        return found


def compared_pairs(output: ObjectiveOutput, lengths: torch.Tensor) -> torch.Tensor:
    """[5, P] float64: margin, shaping margin (0 without shaping), chosen and rejected reward, length difference."""
    assert output.margins is not None
    assert output.chosen_rewards is not None
    assert output.rejected_rewards is not None
    shaping = torch.zeros_like(output.margins) if output.shaping_margins is None else output.shaping_margins
    numbers = (output.margins, shaping, output.chosen_rewards, output.rejected_rewards, lengths)
    return torch.stack([x.double() for x in numbers])


@dataclass(frozen=True)
class IntervalNumbers:
    """An interval's numbers, on the host."""

    losses: list[float]
    grad_norms: list[float]
    """One per step that was taken."""
    skipped: int
    """Steps that were not, their loss or gradient being NaN or inf."""
    baselines: list[float]
    """The KL divergence of each step that was taken, where responses have labels."""
    pairs: torch.Tensor
    """[5, P] of every pair: margin, shaping margin, chosen and rejected reward, length difference; P = 0 where the
    objective compares nothing."""
    tokens: int
    """Tokens that went through the policy."""
    response_tokens: int
    """Tokens that reached its head."""
    capacity: int
    """Tokens that the micro-batches could hold."""

    def metrics(self) -> dict[str, float]:
        """Return the numbers of a metrics line: means. Rewards and margins are unshaped, in β-scaled nats."""
        metrics = {
            "loss": _mean(self.losses),
            "grad_norm": _mean(self.grad_norms),
            "fill": self.tokens / self.capacity,
        }
        if self.baselines:
            metrics["kl"] = _mean(self.baselines)
        if self.skipped:
            metrics["skipped"] = self.skipped
        if self.pairs.shape[1] == 0:
            return metrics
        margins, shaping, chosen, rejected, lengths = self.pairs
        metrics |= {
            "accuracy": float((margins > 0).double().mean()),
            "margin": float(margins.mean()),
            "chosen_reward": float(chosen.mean()),
            "rejected_reward": float(rejected.mean()),
        }
        if torch.count_nonzero(shaping):
            metrics |= shaping_metrics(margins, shaping, lengths)
        return metrics


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


METRICS = "metrics.jsonl"
RESUMES = "rerun the command to resume from the newest whole checkpoint"


class ShapingWatch:
    """Warns, once per run, of shaping that outweighs the policy's margins, over enough pairs for that to mean
    something.

    Margins begin at 0 and any shaping outweighs them there, so the first `skip` steps are not looked at.
    """

    def __init__(self, *, skip: int, pairs: int = 64) -> None:
        self.skip, self.pairs = skip, pairs
        self._seen: list[torch.Tensor] = []
        self._warned = False

    def look(self, step: int, numbers: IntervalNumbers, *, last: bool) -> None:
        """Add an interval that ends with step `step` (from 1); `last` looks at however few pairs there are."""
        if self._warned or step <= self.skip:
            return
        self._seen.append(numbers.pairs)
        pairs = torch.cat(self._seen, 1)
        if pairs.shape[1] == 0 or (pairs.shape[1] < self.pairs and not last):
            return
        self._seen.clear()
        margins, shaping, _, _, lengths = pairs
        warning = shaping_report(margins, shaping, lengths).warning
        if warning:
            self._warned = True
            warnings.warn(warning, stacklevel=3)


class MetricsLog:
    """Appends lines to metrics.jsonl and mirrors them to TensorBoard where it is installed, and to `trackers`, W&B and
    trackio among them, where it is asked for; drops lines of steps after `resume_from`.

    Raises ValueError where a tracker is not installed, and where the disk does not take a line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_from: int,
        trackers: Sequence[str] = (),
        config: dict[str, Any] | None = None,
    ) -> None:
        self.path = folder / METRICS
        lines = [line for line in read_metrics(self.path) if line["step"] <= resume_from]
        partial = self.path.with_suffix(".partial")
        with written(self.path, RESUMES):
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(_line(metrics) for metrics in lines))
            os.replace(partial, self.path)
        self._tensorboard = _tensorboard_writer(folder / "tensorboard", resume_from)
        self._runs = [_tracked(name, folder, config) for name in trackers]

    def write(self, metrics: dict[str, Any]) -> None:
        with written(self.path, RESUMES), self.path.open("a") as file:
            file.write(_line(metrics))
        if self._tensorboard is not None:
            for name, value in metrics.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, metrics["step"])
        for run in self._runs:
            run.log({name: value for name, value in metrics.items() if name != "step"}, step=metrics["step"])

    def close(self) -> None:
        for run in self._runs:
            run.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where there is no file. A torn last line is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def progress_bar(total: int, done: int, *, description: str, enabled: bool) -> tqdm:
    return tqdm(total=total, initial=done, desc=description, unit="step", disable=not enabled, dynamic_ncols=True)


def _line(metrics: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity; a reader gets null.
    return json.dumps({k: _short(v) if isinstance(v, float) else v for k, v in metrics.items()}) + "\n"


def _short(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _tensorboard_writer(folder: Path, resume_from: int) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=resume_from + 1)


def _tracked(name: str, folder: Path, config: dict[str, Any] | None) -> Any:
    """A run of W&B or trackio, whose interfaces are one."""
    try:
        tracker = import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} is not installed: pip install {name}, or leave it out of --trackers") from error
    return tracker.init(project="tvkd_fast", name=folder.name, config=config)
