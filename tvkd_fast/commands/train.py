"""`tvkd train`: from a config to a run, and what the run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tvkd_fast.commands.models import world_of
from tvkd_fast.commands.plan import plan
from tvkd_fast.commands.prepare import prepare
from tvkd_fast.commands.refusals import check_run
from tvkd_fast.distributed import World, is_main_process
from tvkd_fast.evaluation.evaluate import Evaluation
from tvkd_fast.files import ready_folder, written
from tvkd_fast.training.checkpoint import Checkpoints
from tvkd_fast.training.final import ADAPTER, EXPORTED, FINAL, save_trained
from tvkd_fast.training.metrics import METRICS, RESUMES, read_metrics
from tvkd_fast.training.signals import Stopped, StopSignal
from tvkd_fast.training.summary import model_card, summary
from tvkd_fast.training.train_config import TrainConfig
from tvkd_fast.training.trainer import CHECKPOINTS, Trainer
from tvkd_fast.training.usage import memory_by_part

if TYPE_CHECKING:
    pass


def train(config: TrainConfig, *, show_progress: bool = True) -> Evaluation | None:
    """`tvkd train`: build the run, train, and leave a folder `final/` that `from_pretrained` loads.

    Under torchrun every process calls it, and they share the model. Raises `Stopped` after SIGTERM or SIGINT, once the
    steps that are done are saved.
    """
    open_outputs(config)
    check_run(config)
    with world_of(config) as world:
        try:
            return _train(config, world, show_progress=show_progress)
        except Stopped as error:
            # Every process has come here: they part as after a run that was finished.
            stopped = error
    raise stopped


def open_outputs(config: TrainConfig) -> None:
    """Make the folders that the run will write to, before it begins."""
    folder = ready_folder(config.output_dir, holds=(FINAL, ADAPTER))
    if config.save_every >= 0:
        ready_folder(folder / CHECKPOINTS)


def _train(config: TrainConfig, world: World, *, show_progress: bool) -> Evaluation | None:
    made = prepare(config, world, verbose=show_progress and world.first)
    with StopSignal() as stop:
        trainer = Trainer(
            config,
            made.policy,
            made.scorer,
            made.dataset,
            held_out=made.held_out,
            held_out_scorer=made.held_out_scorer,
            sampler=made.sampler,
            identity=made.identity,
            show_progress=show_progress,
            world=world,
            stop=stop,
            selection_scorer=made.selection_scorer,
        )
        evaluation = trainer.run()
        folder = Path(config.output_dir)
        # A run that was finished before has written it, unless it was killed at that.
        if trainer.trained or not world.broadcast(_exported(folder, trainer)):
            save_trained(made.policy, made.tokenizer, folder / FINAL, world, model_card(config, evaluation))
            if world.first:
                with written(folder / EXPORTED, RESUMES):
                    (folder / EXPORTED).write_text(json.dumps(_of_run(trainer)) + "\n")
        if trainer.trained:
            memory = world.all_gather(memory_by_part(made.policy, trainer.optimizer))
            if show_progress and world.first:
                memory_per_part = {part: max(of_one[part] for of_one in memory) for part in memory[0]}
                print(summary(read_metrics(folder / METRICS), evaluation, memory_per_part, world.size))
    return evaluation


def _of_run(trainer: Trainer) -> dict[str, Any]:
    """Identify the run whose model is in final/, so that an earlier run of the same folder is not taken for it."""
    return {"steps": trainer.max_steps, "identity": trainer.identity}


def _exported(folder: Path, trainer: Trainer) -> bool:
    try:
        found = json.loads((folder / EXPORTED).read_text())
    except (OSError, ValueError):
        return False
    return (folder / FINAL).exists() and found == json.loads(json.dumps(_of_run(trainer)))


def best_checkpoint(config: TrainConfig) -> Path | None:
    """Return the checkpoint that keep_best kept in a finished run, or None where it kept none."""
    if config.keep_best == "none":
        return None
    return Checkpoints(Path(config.output_dir) / CHECKPOINTS, World(torch.device("cpu")), keep=1).best()


def check(config: TrainConfig) -> None:
    """The checks that need no process group, before several processes are started."""
    open_outputs(config)
    check_run(config)


def run(config: TrainConfig) -> None:
    """Train, or print the plan, and print the model's path."""
    if config.dry_run:
        if is_main_process():
            print(plan(config))
        return
    evaluation = train(config)
    if not is_main_process():
        return
    print(f"final model: {Path(config.output_dir) / FINAL}")
    best = best_checkpoint(config)
    if best is not None:
        print(f"best by {config.keep_best}: {best}; a model of it: tvkd export {best}")
    elif config.keep_best != "none":
        print(f"best by {config.keep_best}: none, since no checkpoint on disk has a finite {config.keep_best}")
    if evaluation is not None:
        print(json.dumps(evaluation.known()))
