"""What a run says of itself: metrics.jsonl, TensorBoard where it is installed, and the progress bar."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tvkd_fast.losses import shaping_report
from tvkd_fast.training.step import StepOutput


def step_metrics(out: StepOutput) -> dict[str, float]:
    """A step's numbers as a metrics line shows them. Rewards and margins are unshaped, in β-scaled nats."""
    metrics = {"loss": float(out.loss), "grad_norm": float(out.grad_norm)}
    if not out.outputs:
        return metrics
    margins, shaping, chosen, rejected = (
        torch.cat([getattr(o, name).double() for o in out.outputs])
        for name in ("margins", "shaping_margins", "chosen_rewards", "rejected_rewards")
    )
    metrics |= {
        "accuracy": float((margins > 0).double().mean()),
        "margin": float(margins.mean()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
    }
    if torch.count_nonzero(shaping):
        metrics |= shaping_metrics(margins, shaping, torch.cat(out.length_differences))
    return metrics


def shaping_metrics(margins: torch.Tensor, shaping_margins: torch.Tensor, lengths: torch.Tensor) -> dict[str, float]:
    """The shaping's diagnostics (docs/method.md) beside its mean margin."""
    report = shaping_report(margins, shaping_margins, lengths)
    return {
        "shaping_margin": float(shaping_margins.double().mean()),
        "shaping_std_ratio": report.std_ratio,
        "shaping_length_correlation": report.length_correlation,
        "shaping_flipped": report.flipped,
    }


METRICS = "metrics.jsonl"


class ShapingWatch:
    """Warns, once a run, of shaping that outweighs the policy's margins, over enough pairs for that to mean something.

    Margins begin at 0 and any shaping outweighs them there, so the first `skip` steps are not looked at.
    """

    def __init__(self, *, skip: int, pairs: int = 64) -> None:
        self.skip, self.pairs = skip, pairs
        self._seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._warned = False

    def look(self, step: int, out: StepOutput, *, last: bool) -> None:
        """Add step `step` (from 1) to what is looked at; `last` looks at however few pairs there are."""
        if self._warned or step <= self.skip:
            return
        for output, lengths in zip(out.outputs, out.length_differences, strict=True):
            self._seen.append((output.margins, output.shaping_margins, lengths))
        if not self._seen or (sum(m.numel() for m, _, _ in self._seen) < self.pairs and not last):
            return
        margins, shaping, lengths = (torch.cat(column) for column in zip(*self._seen, strict=True))
        self._seen.clear()
        warning = shaping_report(margins, shaping, lengths).warning
        if warning:
            self._warned = True
            warnings.warn(warning, stacklevel=3)


class MetricsLog:
    """Appends lines to metrics.jsonl and mirrors them to TensorBoard; drops lines of steps after `resume_from`."""

    def __init__(self, folder: Path, *, resume_from: int) -> None:
        self.path = folder / METRICS
        lines = [line for line in read_metrics(self.path) if line["step"] <= resume_from]
        folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(_line(metrics) for metrics in lines))
        os.replace(partial, self.path)
        self._tensorboard = _tensorboard_writer(folder / "tensorboard", resume_from)

    def write(self, metrics: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(_line(metrics))
        if self._tensorboard is not None:
            for name, value in metrics.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
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
