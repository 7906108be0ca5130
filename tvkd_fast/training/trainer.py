"""The loop around the step: order of pairs, learning rate, metrics, evaluation, checkpoints, resume."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tvkd_fast.data import PairBatch, PairDataset, pairs_of_step
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.ops import HeadStats
from tvkd_fast.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
    set_aside,
)
from tvkd_fast.training.config import TrainConfig, micro_batching
from tvkd_fast.training.evaluate import Evaluation, evaluate
from tvkd_fast.training.metrics import METRICS, MetricsLog, ShapingWatch, progress_bar, step_metrics
from tvkd_fast.training.optim import learning_rate, make_optimizer
from tvkd_fast.training.scoring import Scorer
from tvkd_fast.training.step import train_step

CHECKPOINTS = "checkpoints"


class Trainer:
    """Trains `policy` on `dataset`; `run` returns the last evaluation.

    Args:
        config: the run. Its data and model fields were used to make the other arguments and are only recorded.
        policy: on its device; its parameters are what is trained.
        scorer: what reference and teacher say of training pairs.
        dataset: training pairs.
        held_out: pairs to evaluate on, with a scorer of their own (or None: the policy alone is evaluated).
        identity: names and fingerprints that a checkpoint must share to be resumed from.
        show_progress: draw a progress bar on stderr.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: PolicyWithHead,
        scorer: Scorer,
        dataset: PairDataset,
        *,
        held_out: PairDataset | None = None,
        held_out_scorer: Scorer | None = None,
        identity: dict[str, Any] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.config, self.policy, self.scorer, self.dataset = config, policy, scorer, dataset
        self.held_out, self.held_out_scorer = held_out, held_out_scorer
        self.batching, self.show_progress = micro_batching(config), show_progress
        policy.head.gradient, policy.head.stats = config.head, HeadStats()
        self.folder = Path(config.output_dir)
        self.max_steps = config.max_steps or max(1, round(config.epochs * len(dataset) / config.pairs_per_step))
        self.device = next(policy.parameters()).device
        self.optimizer = make_optimizer(policy, config.optim)
        if config.pairs_per_step > len(dataset):
            raise ValueError(
                f"a step takes {config.pairs_per_step} pairs and the data has {len(dataset)}: it would repeat pairs; "
                "lower --pairs_per_step, or give more data"
            )
        self.identity = {"dataset": dataset.fingerprint, **_trajectory(config), **(identity or {})}

    def run(self) -> Evaluation | None:
        done = self._resume()
        if done >= self.max_steps:
            print(f"{self.folder}: all {self.max_steps} steps are finished already; nothing was done")
            return None
        log = MetricsLog(self.folder, resume_from=done)
        self.policy.train()
        watch = ShapingWatch(skip=20)
        evaluation = None
        tokens, room, pairs, busy = 0, 0, 0, 0.0
        bar = progress_bar(self.max_steps, done, description=self.config.objective, enabled=self.show_progress)
        with bar, closing(log):
            for step in range(done, self.max_steps):
                since = time.perf_counter()
                batches = self._batches(step)
                lr = self._set_learning_rate(step)
                out = train_step(
                    self.policy,
                    self.scorer,
                    batches,
                    self.optimizer,
                    self.config.loss,
                    objective=self.config.objective,
                    clip_norm=self.config.optim.clip_norm,
                )
                number = step + 1
                busy += time.perf_counter() - since
                tokens += sum(batch.num_tokens for batch in batches)
                room += sum(map(self.batching.room, batches))
                pairs += self.config.pairs_per_step
                last = number == self.max_steps
                watch.look(number, out, last=last)
                if number % self.config.log_every == 0 or last:
                    metrics = {"step": number, **step_metrics(out), "lr": lr}
                    metrics |= {"tokens_per_s": tokens / busy, "pairs_per_s": pairs / busy, "fill": tokens / room}
                    metrics |= self._head_metrics()
                    log.write(metrics)
                    bar.set_postfix(_shown(metrics), refresh=False)
                    tokens, room, pairs, busy = 0, 0, 0, 0.0
                bar.update()
                if self.held_out is not None and (last or _due(number, self.config.eval_every)):
                    evaluation = self._evaluate()
                    log.write({"step": number} | {f"eval/{k}": v for k, v in evaluation.known().items()})
                if (last and self.config.save_every >= 0) or _due(number, self.config.save_every):
                    self._save(number)
        return evaluation

    def _resume(self) -> int:
        """Steps that a whole checkpoint of this run has done already; its state is put back."""
        torch.manual_seed(self.config.seed)
        folder = self.folder / CHECKPOINTS
        if not self.config.resume:
            set_aside(folder)
            set_aside(self.folder / METRICS)
        path = newest_checkpoint(folder)
        if path is None:
            return 0
        state = read_state(path)
        if self.show_progress:
            print(f"resuming from {path}")
        for name, value in self.identity.items():
            if state["identity"].get(name) != value:
                raise CheckpointError(
                    f"{path} was made with another {name} ({state['identity'].get(name)}, now {value}): give "
                    "--output_dir a folder of its own, or --resume false to start again there"
                )
        load_checkpoint(path, self.policy, self.optimizer)
        return int(state["step"])

    def _save(self, step: int) -> None:
        extra = {"identity": self.identity, "config": asdict(self.config)}
        save_checkpoint(
            self.folder / CHECKPOINTS,
            step,
            self.policy,
            self.optimizer,
            extra,
            keep=self.config.keep_checkpoints,
        )

    def _batches(self, step: int) -> list[PairBatch]:
        config = self.config
        indices = pairs_of_step(config.seed, step, num_pairs=len(self.dataset), pairs_per_step=config.pairs_per_step)
        batches = self.batching.batches(self.dataset, indices, chosen_only=config.objective == "sft")
        return [batch.to(self.device) for batch in batches]

    def _set_learning_rate(self, step: int) -> float:
        lr = learning_rate(step, self.max_steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _head_metrics(self) -> dict[str, float]:
        """What the sparse gradients since the last line were made of; nothing where they were exact."""
        stats = self.policy.head.stats
        if stats is None:
            return {}
        numbers = stats.read()
        stats.reset()
        return numbers

    def _evaluate(self) -> Evaluation:
        assert self.held_out is not None
        return evaluate(
            self.policy,
            self.held_out,
            scorer=self.held_out_scorer,
            loss=self.config.loss,
            objective=self.config.objective,
            batching=self.batching,
            device=self.device,
        )


def _trajectory(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide where a run goes: a resumed run must share them, or it would be neither."""
    names = ("objective", "seed", "pairs_per_step", "max_steps", "epochs")
    return {name: getattr(config, name) for name in names} | {
        "loss": asdict(config.loss),
        "optim": _plain(config.optim),
        "head": asdict(config.head),
    }


def _plain(config: Any) -> dict[str, Any]:
    """As JSON reads it back: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _shown(metrics: dict[str, Any]) -> dict[str, str]:
    shown = {"loss": f"{metrics['loss']:.3f}"}
    if "accuracy" in metrics:
        shown["acc"] = f"{metrics['accuracy']:.2f}"
    return shown | {"tok/s": f"{metrics['tokens_per_s']:,.0f}"}
