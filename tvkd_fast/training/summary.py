"""The texts that a run leaves: the table at its end, and the model card beside the model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from tvkd_fast.evaluation.evaluate import Evaluation
from tvkd_fast.objectives import TEACHER, Need
from tvkd_fast.training.train_config import TrainConfig
from tvkd_fast.version import __version__

_SHOWN = ("loss", "accuracy", "margin", "tokens_per_s", "mfu", "peak_memory_gb")


def summary(lines: list[dict[str, Any]], evaluation: Evaluation | None, memory: dict[str, int], processes: int) -> str:
    """A table of metrics at the run's first and last line, the last evaluation, and memory by part.

    `lines` are those of metrics.jsonl, `memory` bytes of the process that holds most.
    """
    steps = [line for line in lines if "loss" in line]
    rows = [("", "first", "last")]
    for name in _SHOWN:
        if any(line.get(name) is not None for line in steps):
            rows.append((name, _number(steps[0].get(name)), _number(steps[-1].get(name))))
    if steps:
        rows.insert(1, ("step", str(steps[0]["step"]), str(steps[-1]["step"])))
    if evaluation is not None:
        rows += [(f"eval/{name}", "", _number(value)) for name, value in evaluation.known().items()]
    rows += [(f"{part}, GB", "", _number(size / 1e9)) for part, size in memory.items()]
    if processes > 1:
        rows.append(("processes", "", str(processes)))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}} {first:>12} {last:>12}".rstrip() for name, first, last in rows)


def model_card(config: TrainConfig, evaluation: Evaluation | None) -> str:
    """Markdown with the hub's metadata: what the model was made of, by which recipe, and what it measured."""
    sources = {"base_model": config.policy, "datasets": config.data.train}
    # A folder of the machine it was made on is nobody else's affair.
    meta: dict[str, Any] = {name: x for name, x in sources.items() if x is not None and _on_a_hub(x)}
    if "datasets" in meta:
        meta["datasets"] = [meta["datasets"].split(":")[0]]
    meta |= {"library_name": "transformers", "tags": [config.objective, "preference-optimization", "tvkd_fast"]}
    made = {
        "objective": config.objective,
        "policy": _name(config.policy),
        "teacher": _name(config.teacher) or "its scores, made before",
        "reference": _name(config.reference) or "the policy at the start",
        "data": _name(config.data.train),
        "loss": config.loss.settings(),
        "optim": asdict(config.optim),
        "pairs per step": config.pairs_per_step,
        "steps": config.max_steps or f"{config.epochs} epochs",
    }
    needs = config.loss.needs
    if not needs & TEACHER:
        del made["teacher"]
    if Need.REFERENCE not in needs:
        del made["reference"]
    if not made["loss"]:
        del made["loss"]
    if config.lora.rank:
        made["lora"] = asdict(config.lora)
    recipe = "\n".join(f"| {name} | {_cell(value)} |" for name, value in made.items())
    parts = [
        f"---\n{yaml.safe_dump(meta, sort_keys=True).strip()}\n---",
        f"# {Path(config.output_dir).name}",
        f"Trained with tvkd_fast {__version__} on preference pairs.",
        f"| recipe | |\n| --- | --- |\n{recipe}",
    ]
    if evaluation is not None:
        figures = "\n".join(f"| {name} | {_number(value)} |" for name, value in evaluation.known().items())
        parts.append(f"| on held-out pairs of {_name(config.data.eval)} | |\n| --- | ---: |\n{figures}")
    return "\n\n".join(parts) + "\n"


def _on_a_hub(name: str) -> bool:
    return not Path(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _name(source: str | None) -> str | None:
    """A hub's name as it is; of a file or folder the last part."""
    if source is None or _on_a_hub(source):
        return source
    path = Path(source)
    if not (path.exists() or path.is_absolute()):
        return source
    return path.parent.name if path.name == "final" else path.name


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {x}" for name, x in value.items() if x is not None)
    return str(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"
