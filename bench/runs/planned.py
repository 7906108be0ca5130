"""The memory that a dry run plans for a process, beside what a run takes on a CPU.

    python -m bench.runs.planned --data PAIRS.jsonl.gz --json FILE

Each case trains the packaged model, or a pruned one, for three steps in processes of its own: as the C library has it,
and with freed memory returned at once (`--model.return_memory`). What a process holds is reset once its models are
there (VmHWM), so that what loading takes is in neither figure; the plan is made in the same process before they are,
with the libraries and the data that a dry run has loaded too. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.harness.machine import made_by, write_report
from tvkd_fast.commands import plan
from tvkd_fast.commands.models import world_of
from tvkd_fast.commands.prepare import prepare
from tvkd_fast.data.data_config import DataConfig, load_dataset
from tvkd_fast.distributed import launch
from tvkd_fast.distributed.parallel_config import ParallelConfig
from tvkd_fast.models import load_tokenizer, model_shape
from tvkd_fast.models.settings import LoraConfig, ModelConfig
from tvkd_fast.planning.footprint import Footprint
from tvkd_fast.training.record import from_record
from tvkd_fast.training.train_config import TrainConfig, micro_batching
from tvkd_fast.training.trainer import Trainer
from tvkd_fast.training.usage import process_bytes

POLICY, STEPS = "smollm2-135m", 3


def cases(data: str) -> dict[str, TrainConfig]:
    def case(**fields: Any) -> TrainConfig:
        given: dict[str, Any] = {"objective": "dpo", "pairs_per_step": 16, "tokens_per_micro_batch": 2048} | fields
        return TrainConfig(
            policy=POLICY,
            output_dir="",
            data=DataConfig(train=data, max_length=256, overlong="drop", bad_pairs="drop"),
            max_steps=STEPS,
            save_every=-1,
            resume=False,
            **given,
        )

    full, selective = (ModelConfig(activation_checkpointing=how) for how in ("full", "selective"))
    return {
        "4 layers": case(student_layers=4),
        "4 layers, rows of 512": case(student_layers=4, tokens_per_micro_batch=512),
        "12 layers": case(student_layers=12),
        "30 layers": case(),
        "30 layers, one row": case(pairs_per_step=8),
        "30 layers, selective": case(model=selective),
        "30 layers, full": case(model=full),
        "30 layers, bfloat16 products": case(model=ModelConfig(autocast="bfloat16")),
        "30 layers, padded": case(model=ModelConfig(packing="padded")),
        "30 layers, sft": case(objective="sft"),
        "30 layers, LoRA": case(lora=LoraConfig(rank=8)),
        "12 layers with a teacher of 30": case(student_layers=12, objective="tvkd", teacher=POLICY),
        "12 layers, two processes": case(student_layers=12, nproc=2),
        "12 layers, two, shared vocabulary": case(
            student_layers=12, nproc=2, parallel=ParallelConfig(vocabulary="shared")
        ),
        "12 layers, two, full": case(student_layers=12, nproc=2, model=full),
    }


def measure(config: TrainConfig, folder: Path) -> None:
    """Record in a process of the run the planned and the measured memory."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.nproc))
    # As a dry run has it.
    tokenizer = load_tokenizer(config.policy)
    dataset = load_dataset("train", config.data, tokenizer, micro_batching(config))
    policy = model_shape(config.policy, layers=config.student_layers)
    teacher = None if config.teacher is None else model_shape(config.teacher)
    footprint = Footprint(config, policy, teacher, plan.tokens_of(dataset), config.nproc)
    moment, parts = footprint.memory()
    parts = plan.on_a_cpu(config, parts)
    del dataset
    with world_of(config) as world:
        made = prepare(config, world, verbose=False)
        trainer = Trainer(config, made.policy, made.scorer, made.dataset, show_progress=False, world=world)
        Path("/proc/self/clear_refs").write_text("5")
        before = process_bytes("VmRSS")
        trainer.run()
        found = {"moment": moment, "planned": parts, "before": before, "held": process_bytes("VmHWM")}
        (folder / f"{world.rank}.json").write_text(json.dumps(found))


def run(name: str, config: TrainConfig) -> dict[str, Any]:
    """A case's figures, of the process that held most."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output_dir=str(Path(folder) / "run"))
        (Path(folder) / "config.json").write_text(json.dumps(asdict(config)))
        command = [sys.executable, "-m", "bench.runs.planned", "--case", folder]
        status = launch(command, config.nproc) if config.nproc > 1 else subprocess.run(command).returncode
        if status:
            raise SystemExit(f"{name}: status {status}")
        found = [json.loads(file.read_text()) for file in Path(folder).glob("?.json")]
    row: dict[str, Any] = max(found, key=lambda one: one["held"])
    planned = sum(row["planned"].values())
    row["ratio"] = planned / row["held"]
    print(
        f"{name:<46}{planned / 2**30:6.2f} planned {row['held'] / 2**30:6.2f} held  {row['ratio']:.2f}  "
        f"{row['before'] / 2**30:.2f} before"
    )
    print("   ", row["moment"], {part: round(size / 2**30, 2) for part, size in row["planned"].items()}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bundled:train")
    parser.add_argument("--only", action="append", help="part of a case's name; may be repeated")
    parser.add_argument("--case", type=Path, help="(a process of a run) its folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.case is not None:
        config = from_record(TrainConfig, json.loads((arguments.case / "config.json").read_text()))
        measure(config, arguments.case)
        return
    os.environ["TQDM_DISABLE"] = "1"
    rows = []
    for name, config in cases(arguments.data).items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        returned = replace(config, model=replace(config.model, return_memory=True))
        rows.append({"name": name, "kept": run(name, config), "returned": run(f"{name}, returned", returned)})
    write_report({"rows": rows, "model": POLICY, "made_by": made_by()}, arguments.json)


if __name__ == "__main__":
    main()
