"""The cost of selecting a step's pairs, and the held-out figures after the same number of updates.

    python -m bench.runs.selection --steps 8 --json out/selection.json

A student of 12 layers of SmolLM2-135M is trained by DPO on the bundled pairs, the whole model being the teacher whose
log-probabilities a selection reads; reference and teacher are scored once before. Every arm begins anew from the same
weights and takes its pairs from the same order.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench.harness.machine import made_by, write_report
from tvkd_fast.cli.parser import load_recipe
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.commands.train import train
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.training.metrics import METRICS, read_metrics
from tvkd_fast.training.train_config import TrainConfig

ARMS = (("no", 0.0), ("easy_reference", 0.5), ("learnability", 0.5), ("learnability", 0.8))
"""Selections, and the share of pairs that each leaves out."""
RECIPE = "dadpo-smollm2-135m"
SETTLING = 1
"""Steps at the start whose times are not looked at."""


def run_arm(config: TrainConfig, by: Any, ratio: float, output: Path) -> dict[str, Any]:
    """One arm: seconds per update, and the figures at its end."""
    data = config.data if by == "no" else replace(config.data, select=by, select_ratio=ratio)
    config = replace(config, data=data, output_dir=str(output))
    figures = train(config, show_progress=False)
    lines = [line for line in read_metrics(output / METRICS) if "loss" in line]
    return {
        "select": by,
        "ratio": ratio,
        "taken": config.pairs_taken,
        "kept": config.pairs_per_step,
        "seconds": median(config.pairs_per_step / line["pairs_per_s"] for line in lines[SETTLING:]),
        "held_out": None if figures is None else {"reward_accuracy": figures.reward_accuracy, "loss": figures.loss},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=96, help="held-out pairs to judge each arm by; 0: none")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    recipe = load_recipe(RECIPE)
    with TemporaryDirectory() as folder:
        taken = {"train_limit": 5 * recipe.pairs_per_step * arguments.steps, "max_length": 128, "overlong": "drop"}
        judged = f"bundled:eval:{arguments.held_out}" if arguments.held_out else None
        data = replace(recipe.data, eval=judged, **taken)
        scores = f"{folder}/scores"
        score(
            ScoreConfig(
                output_dir=scores,
                policy=recipe.policy,
                student_layers=recipe.student_layers,
                teacher=recipe.teacher,
                keep=["logps"],
                data=data,
            ),
            show_progress=False,
        )
        config = replace(
            recipe,
            objective="dpo",
            loss=DPO(),
            teacher=None,
            scores=scores,
            data=data,
            max_steps=arguments.steps,
            eval_every=arguments.steps if arguments.held_out else 0,
            save_every=-1,
            log_every=1,
        )
        rows = []
        for by, ratio in ARMS:
            rows.append(run_arm(config, by, ratio, Path(folder, f"{by}-{ratio}")))
            print(rows[-1], flush=True)
    report = {"steps": arguments.steps, "held_out": arguments.held_out, "rows": rows, "made_by": made_by()}
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
