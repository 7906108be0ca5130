"""The demo on one machine: a teacher by DPO, a pruned student, the teacher's scores, TVKD and DPO side by side.

Each stage leaves a folder under `out`, and a rerun skips the stages that have finished there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tvkd_fast.commands.models import load_policy
from tvkd_fast.commands.plot import plot_curves
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.commands.train import train
from tvkd_fast.data.data_config import DataConfig, load_dataset
from tvkd_fast.evaluation.evaluate import evaluate
from tvkd_fast.evaluation.generate import answers
from tvkd_fast.files import at_home, ready_folder, written
from tvkd_fast.models import load_model, load_stop_ids, load_tokenizer, prune_layers
from tvkd_fast.objectives import DEFAULT, TEACHER, Objective
from tvkd_fast.objectives.sft import SFT
from tvkd_fast.ranges import POSITIVE, at_least, check_numbers, number
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.scorer import CachedScorer, OnlineScorer, Scorer
from tvkd_fast.synthetic.bundled import judge, preference_rows
from tvkd_fast.training.final import FINAL, save_final
from tvkd_fast.training.metrics import read_metrics
from tvkd_fast.training.optim import OptimConfig
from tvkd_fast.training.train_config import TrainConfig, micro_batching
from tvkd_fast.version import __version__

if TYPE_CHECKING:
    from tvkd_fast.data.reading.formats import Message

SHOWN_ANSWERS = 3
STAGE = "stage.json"


@dataclass(kw_only=True)
class DemoConfig:
    """The settings of `tvkd demo`: a teacher, a student, the teacher's scores, and TVKD beside DPO."""

    out: str = "out/demo"
    """Folder for models, scores, metrics, report.json and curves.png."""
    recipe: str = "demo"
    """Training recipe of the student: a name in tvkd_fast/recipes or a YAML file."""
    quick: bool = False
    """The same stages in under a minute: fewer steps and pairs. Its figures mean little."""
    train: str | None = None
    """Training pairs instead of the recipe's."""
    eval: str | None = None
    """Held-out pairs instead of the recipe's."""
    teacher_steps: int = number(20, at_least(1))
    """DPO steps that make the teacher out of the recipe's policy."""
    teacher_lr: float = number(1e-5, POSITIVE)
    """Peak learning rate of the teacher's DPO."""
    warm_steps: int = number(150, at_least(1))
    """SFT steps on chosen responses that warm the pruned student."""
    warm_lr: float = number(1e-3, POSITIVE)
    """Peak learning rate of the student's SFT."""
    steps: int | None = number(None, at_least(1))
    """Steps of TVKD, and of DPO beside it, instead of the recipe's."""
    judged: int = number(24, at_least(0))
    """Bundled prompts answered greedily by each model and judged by rule; 0 leaves it out."""
    seed: int | None = number(None, at_least(0))
    """Seed instead of the recipe's."""

    def __post_init__(self) -> None:
        at_home(self)
        check_numbers(self)
        if self.quick:
            self.teacher_steps, self.warm_steps, self.judged = 1, 3, 0
            self.steps = self.steps or 3


def run_demo(config: DemoConfig, recipe: TrainConfig, *, report_line: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all stages and return the report, which is also written to `out/report.json` beside `out/curves.png`."""
    out = Path(config.out)
    recipe = _adapt(config, recipe)
    _check(config, recipe)
    plain, shaped = _compared(recipe)
    started = time.perf_counter()
    stages = {
        "base": lambda: _base(recipe, out / "base"),
        "teacher": lambda: _teacher(config, recipe, out),
        "student": lambda: _student(config, recipe, out),
        "scores": lambda: _scores(recipe, out),
        plain.name: lambda: _run(recipe, out, plain),
        shaped.name: lambda: _run(recipe, out, shaped),
    }
    settings = {"config": asdict(config) | {"out": None}, "recipe": asdict(recipe) | {"output_dir": None}}
    _claim(out, settings)
    for name, stage in stages.items():
        if _finished(out / name):
            report_line(f"{name}: done already")
            continue
        report_line(f"{name} …")
        since = time.perf_counter()
        stage()
        made = provenance() | {"seconds": round(time.perf_counter() - since, 1)}
        (out / name / STAGE).write_text(json.dumps(made, indent=2) + "\n")
    report_line("evaluation …")
    report = _report(config, recipe, out)
    report["stages"] = {n: json.loads(p.read_text()) for n in stages if (p := out / n / STAGE).exists()}
    report["seconds"] = round(time.perf_counter() - started, 1)
    report["made_by"] = provenance() | {"command": f"tvkd {' '.join(sys.argv[1:])}", **settings}
    text = json.dumps(report, indent=2, allow_nan=False)
    report = json.loads(text)
    with written(out / "report.json"):
        (out / "report.json").write_text(text + "\n")
    report_line(table(report))
    start = _start_line(report)
    runs = {name.upper(): [start, *read_metrics(out / name / "metrics.jsonl")] for name in (plain.name, shaped.name)}
    data = Path(str(recipe.data.train)).name
    plot_curves(runs, out / "curves.png", title=f"{data}: one start, one seed, the same pairs in the same order")
    report_line(f"\nwrote {out / 'report.json'} and {out / 'curves.png'} in {report['seconds']:.0f} s")
    return report


def table(report: dict[str, Any]) -> str:
    """Return the table of a report's four models as text."""
    judged = "judged" in report["start"]
    head = f"{'':<10}{'accuracy':>16}{'margin (nats)':>20}{'reward accuracy':>17}" + (
        f"{'good answers':>14}" if judged else ""
    )
    lines = [f"held-out pairs: {report['pairs']}", head]
    for name in (name for name in report if isinstance(report[name], dict) and "accuracy_ci" in report[name]):
        row = report[name]
        reward = f"{row['reward_accuracy']:.3f}" if row.get("reward_accuracy") is not None else "–"
        accuracy = f"{row['accuracy']:.3f} ± {row['accuracy_ci']:.3f}"
        margin = f"{row['margin']:+.3f} ± {row['margin_ci']:.3f}"
        good = f"{row['judged']:>14.2f}" if judged else ""
        lines.append(f"{name:<10}{accuracy:>16}{margin:>20}{reward:>17}{good}")
    lines.append(
        "accuracy and margin: log π(chosen) against log π(rejected); reward accuracy: against the model's own start"
    )
    for shown in report["answers"]:
        lines += ["", f"prompt  {shown['prompt']}", f"before  {shown['before']}", f"after   {shown['after']}"]
    return "\n".join(lines)


def _adapt(config: DemoConfig, recipe: TrainConfig) -> TrainConfig:
    data = replace(recipe.data, train=config.train or recipe.data.train, eval=config.eval or recipe.data.eval)
    if config.quick:
        data = replace(data, train_limit=12, eval_limit=8)
    steps = config.steps or recipe.max_steps
    return replace(
        recipe,
        data=data,
        max_steps=steps,
        seed=recipe.seed if config.seed is None else config.seed,
        pairs_per_step=2 if config.quick else recipe.pairs_per_step,
        eval_every=0 if config.quick else recipe.eval_every,
        optim=replace(recipe.optim, warmup_steps=min(recipe.optim.warmup_steps, (steps or 10) // 2)),
        save_every=-1,
    )


def _check(config: DemoConfig, recipe: TrainConfig) -> None:
    """Raise ValueError early where a later stage would fail."""
    if recipe.student_layers is None:
        raise ValueError("the demo prunes its student: set student_layers in the recipe")
    if recipe.data.train is None or recipe.data.eval is None:
        raise ValueError(
            "the demo needs training and held-out pairs: set --train and --eval, or name them in the recipe"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the demo draws its curves with matplotlib: pip install 'tvkd_fast[plot]'")


def _base(recipe: TrainConfig, folder: Path) -> None:
    """Save the recipe's policy in a folder, so that a GGUF file is dequantised once."""
    save_final(load_model(recipe.policy), None, load_tokenizer(recipe.policy), folder / FINAL)


def _compared(recipe: TrainConfig) -> tuple[Objective, Objective]:
    """The recipe's objective without its teacher, and with it."""
    plain = recipe.loss.without(TEACHER)
    if plain is None or plain is recipe.loss:
        raise ValueError(
            f"the demo compares an objective with and without its teacher, and {recipe.objective} is no such: give "
            f"--recipe one of {DEFAULT}"
        )
    return plain, recipe.loss


def _teacher(config: DemoConfig, recipe: TrainConfig, out: Path) -> None:
    plain, _ = _compared(recipe)
    train(
        replace(
            recipe,
            policy=str(out / "base" / FINAL),
            output_dir=str(out / "teacher"),
            objective=plain.name,
            loss=plain,
            teacher=None,
            student_layers=None,
            max_steps=config.teacher_steps,
            optim=OptimConfig(lr=config.teacher_lr, warmup_steps=config.teacher_steps // 10),
            data=replace(recipe.data, eval=None),
            eval_every=0,
        )
    )


def _student(config: DemoConfig, recipe: TrainConfig, out: Path) -> None:
    pruned = out / "pruned" / FINAL
    assert recipe.student_layers is not None
    base = str(out / "base" / FINAL)
    save_final(prune_layers(load_model(base), recipe.student_layers), None, load_tokenizer(base), pruned)
    train(
        replace(
            recipe,
            policy=str(pruned),
            output_dir=str(out / "student"),
            objective=SFT.name,
            loss=SFT(),
            teacher=None,
            student_layers=None,
            max_steps=config.warm_steps,
            optim=OptimConfig(lr=config.warm_lr, warmup_steps=config.warm_steps // 10),
            data=replace(recipe.data, eval=None),
            eval_every=0,
        )
    )


def _scores(recipe: TrainConfig, out: Path) -> None:
    partial = out / "scores" / "partial"
    for which in ("train", "eval"):
        score(
            ScoreConfig(
                output_dir=str(partial / which),
                policy=str(out / "student" / FINAL),
                teacher=str(out / "teacher" / FINAL),
                kappa=recipe.loss.teacher_kappa,
                which=which,
                tokens_per_micro_batch=recipe.tokens_per_micro_batch,
                pairs_per_micro_batch=recipe.pairs_per_micro_batch,
                data=_used(recipe),
                model=recipe.model,
            )
        )
    partial.rename(out / "scores" / FINAL)


def _run(recipe: TrainConfig, out: Path, objective: Objective) -> None:
    train(
        replace(
            recipe,
            policy=str(out / "student" / FINAL),
            output_dir=str(out / objective.name),
            objective=objective.name,
            loss=objective,
            teacher=None,
            student_layers=None,
            scores=str(out / "scores" / FINAL / "train"),
            eval_scores=str(out / "scores" / FINAL / "eval"),
            data=_used(recipe),
        )
    )


def _used(recipe: TrainConfig) -> DataConfig:
    """Limit the training rows to the pairs that the run takes, so that no others are scored."""
    if recipe.max_steps is None:
        return recipe.data
    rows = recipe.max_steps * recipe.pairs_per_step
    return replace(recipe.data, train_limit=min(rows, recipe.data.train_limit or rows))


def _report(config: DemoConfig, recipe: TrainConfig, out: Path) -> dict[str, Any]:
    """Measure the four models on the held-out pairs, and collect their answers to bundled prompts."""
    tokenizer = load_tokenizer(out / "student" / FINAL)
    stops = load_stop_ids(out / "student" / FINAL)
    held_out = load_dataset("eval", recipe.data, tokenizer, micro_batching(recipe), stop_ids=stops)
    scores = CachedScorer(ScoreCache.load(out / "scores" / FINAL / "eval", held_out))
    plain, shaped = _compared(recipe)
    scorers: dict[str, Scorer | None] = {"start": None, plain.name: scores, shaped.name: scores, "teacher": None}
    prompts: list[list[Message]] = [row["prompt"] for row in preference_rows("eval", max(SHOWN_ANSWERS, config.judged))]
    report: dict[str, Any] = {"pairs": len(held_out)}
    given: dict[str, list[str]] = {}
    for name, scorer in scorers.items():
        policy = load_policy(str(out / ("student" if name == "start" else name) / FINAL), recipe.model)
        if name == "teacher":
            scorer = OnlineScorer(load_policy(str(out / "base" / FINAL), recipe.model).eval(), None)
        evaluation = evaluate(
            policy,
            held_out,
            scorer=scorer,
            objective=shaped if name == shaped.name else plain,
        )
        report[name] = {key: value for key, value in evaluation.known().items() if key != "pairs"}
        if config.judged or name in ("start", shaped.name):
            given[name] = answers(policy.model, tokenizer, prompts, max_new_tokens=12 if config.quick else 40)
        if config.judged:
            good = [judge(p, a).good for p, a in zip(prompts, given[name], strict=True)]
            report[name]["judged"] = sum(good) / len(good)
    report["answers"] = [
        {"prompt": prompts[i][-1]["content"], "before": given["start"][i], "after": given[shaped.name][i]}
        for i in range(SHOWN_ANSWERS)
    ]
    return report


def _start_line(report: dict[str, Any]) -> dict[str, Any]:
    """Return the first point of both curves."""
    return {"step": 0, "eval/accuracy": report["start"]["accuracy"], "eval/margin": report["start"]["margin"]}


def _finished(folder: Path) -> bool:
    return (folder / FINAL).is_dir()


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Record the settings in the folder, and refuse one that holds a demo with others: its stages would be reused."""
    ready_folder(out)
    path, text = out / "road.json", json.dumps(settings, indent=2) + "\n"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{out} holds a demo with other settings: give --out a folder of its own, or remove that one")
    path.write_text(text)


def provenance(threads: int | None = None) -> dict[str, Any]:
    """Return the versions, commit and machine that accompany every figure.

    Pass `threads` where other processes took part.
    """
    import transformers

    threads = torch.get_num_threads() if threads is None else threads

    return {
        "tvkd_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}, {threads} threads, {_processor()}",
    }


def _commit() -> str | None:
    """Return the commit of the checkout that the package runs from, with + where it was changed; None outside one."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def run(config: DemoConfig, recipe: TrainConfig) -> None:
    """Run the demo in one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("tvkd demo runs in one process: start it without torchrun")
    run_demo(config, recipe)
