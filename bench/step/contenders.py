"""Whole training steps that are compared: each in a process of its own, which takes a step when it is its turn.

Letters: P pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from bench.harness.contenders import Contender
from bench.harness.processes import Worker, peak_memory, reset_peak_memory
from tvkd_fast.commands.models import load_policy
from tvkd_fast.data import MicroBatching, PairBatch, TokenizedPair
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.ops import HeadGradient
from tvkd_fast.scoring.layout import Scores
from tvkd_fast.training.optim import OptimConfig, make_optimizer
from tvkd_fast.training.step import train_step

BETA, LR, CLIP = 0.1, 1e-6, 1.0
OURS, TRL = "tvkd_fast", "trl"
COMPILED = f"{OURS}, compiled"
ROWS = 512
"""Tokens whose logits the float64 reference holds at once."""


@dataclass(frozen=True)
class StepTask:
    """The task of all contenders: one start, the same pairs step by step, and the reference's log-probabilities."""

    start: str
    """Folder of the model."""
    pairs: list[TokenizedPair]
    ref_logps: Tensor
    """[P, 2] float32."""
    start_logps: Tensor
    """[pairs of a step, 2] float64, the start's own of the first step's pairs: what a contender is checked by."""
    pairs_per_step: int
    batching: MicroBatching
    """Ours."""
    threads: int
    folder: str
    """The folder for files that a trainer leaves."""

    @property
    def steps(self) -> int:
        return len(self.pairs) // self.pairs_per_step

    def of_step(self, step: int) -> range:
        return range(step * self.pairs_per_step, (step + 1) * self.pairs_per_step)


class Turns:
    """A contender's end of the pipe: it sends its first log-probabilities, then waits for its turn and sends a step."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def ready(self, logps: Tensor) -> None:
        """`logps` [P, 2] of the first step's pairs, from the start."""
        self.connection.send(logps)

    def begin(self) -> None:
        if self.connection.recv() == "first":
            reset_peak_memory()
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self.since

    def end(self, loss: float, grad_norm: float) -> None:
        peak_mb = peak_memory() / 2**20
        self.connection.send({"seconds": self.seconds, "loss": loss, "grad_norm": grad_norm, "peak_mb": peak_mb})


Run = Callable[[StepTask, Turns], None]
"""Trains in a process of its own, step by step as it is its turn."""


class Training:
    """A contender's process, from outside: its log-probabilities at the start, then a step when it is asked for one."""

    def __init__(self, contender: Contender[Run], task: StepTask) -> None:
        self.worker = Worker(_serve, contender.run, task, start="spawn", threads=task.threads)
        self.logps: Tensor = self.worker.answer()
        self.steps: list[dict[str, float]] = []

    def step(self) -> float:
        """Take one; its seconds."""
        self.steps.append(self.worker.ask("next" if self.steps else "first"))
        return self.steps[-1]["seconds"]

    def close(self) -> None:
        self.worker.close()


def _serve(connection: Connection, run: Run, task: StepTask) -> None:
    run(task, Turns(connection))


class KnownScores:
    """A scorer of log-probabilities that are known already."""

    def __init__(self, ref_logps: Tensor) -> None:
        self.ref_logps = ref_logps

    def of(self, batch: PairBatch) -> Scores:
        return Scores(self.ref_logps[batch.pairs].T.flatten(), None, None)


@torch.no_grad()
def logps_of(policy: PolicyWithHead, task: StepTask, which: range) -> Tensor:
    """[P, 2] summed log-probabilities of these pairs' chosen and rejected responses."""
    found = torch.empty(len(which), 2)
    for batch in task.batching.batches(task.pairs, which):
        found[batch.pairs - which.start] = segment_sums(policy(batch), batch.cu_seqlens).view(2, -1).T
    return found


@torch.no_grad()
def exact_logps_of(policy: PolicyWithHead, task: StepTask, which: range) -> Tensor:
    """[P, 2] the same in float64, from whole logits a few tokens at a time; the policy is float64 from here on."""
    policy.double()
    found = torch.empty(len(which), 2, dtype=torch.float64)
    for batch in task.batching.batches(task.pairs, which):
        hidden = policy.hidden(batch, batch.predicting)
        rows = zip(hidden.split(ROWS), batch.labels.split(ROWS), strict=True)
        token_logps = [(h @ policy.head.weight.T).log_softmax(1).gather(1, labels[:, None])[:, 0] for h, labels in rows]
        found[batch.pairs - which.start] = segment_sums(torch.cat(token_logps), batch.cu_seqlens).view(2, -1).T
    return found


def ours(gradient: HeadGradient, tokens: int | None, task: StepTask, turns: Turns, *, compiled: bool = False) -> None:
    """Our step, in rows of at most `tokens` tokens where the task's own budget is not wanted."""
    batching = task.batching if tokens is None else replace(task.batching, tokens=tokens)
    policy = load_policy(task.start, ModelConfig(packing=task.batching.packing, compile=compiled))
    policy.head.gradient = gradient
    turns.ready(logps_of(policy, task, task.of_step(0)))
    optim = OptimConfig(lr=LR, clip_norm=CLIP)
    optimizer = make_optimizer(policy, optim)
    policy.train()
    for step in range(task.steps):
        turns.begin()
        out = train_step(
            policy,
            KnownScores(task.ref_logps),
            list(batching.batches(task.pairs, task.of_step(step))),
            optimizer,
            DPO(beta=BETA),
            clip_norm=CLIP,
        )
        turns.stop()
        turns.end(float(out.loss), float(out.grad_norm))


def trl(batch_size: int, task: StepTask, turns: Turns) -> None:
    """TRL's own trainer over our token ids, `batch_size` pairs per micro-batch."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    losses: list[Tensor] = []

    class Turn(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()
            losses.clear()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "grad_norm" in logs:
                turns.end(float(sum(losses)), float(logs["grad_norm"]))

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            losses.append(loss)
            return loss

    columns = {
        "prompt_ids": [pair.prompt_ids for pair in task.pairs],
        "chosen_ids": [pair.chosen_ids for pair in task.pairs],
        "rejected_ids": [pair.rejected_ids for pair in task.pairs],
        "ref_chosen_logps": task.ref_logps[:, 0].tolist(),
        "ref_rejected_logps": task.ref_logps[:, 1].tolist(),
    }
    config = DPOConfig(
        output_dir=task.folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=task.pairs_per_step // batch_size,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(task.start),
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(task.start),
        callbacks=[Turn()],
    )
    found = []
    for first in range(0, task.pairs_per_step, batch_size):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(first, first + batch_size)])
        with torch.no_grad():
            found.append(torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), 1))
    turns.ready(torch.cat(found))
    trainer.train()


def contenders(max_length: int, trl_batch: int) -> dict[str, Contender[Run]]:
    """Return the contenders by name: every variant of ours, and TRL's trainer in micro-batches of so many pairs."""
    shortest = 2 * max_length
    exact, sparse = HeadGradient(), HeadGradient(grad_mode="sparse", eps=2.0**-16)
    return {
        OURS: Contender(run=partial(ours, exact, None)),
        COMPILED: Contender(run=partial(ours, exact, None, compiled=True)),
        f"{OURS}, sparse 2^-16": Contender(run=partial(ours, sparse, None)),
        f"{OURS}, rows of {shortest:,} tokens": Contender(run=partial(ours, exact, shortest)),
        TRL: Contender(run=partial(trl, trl_batch), needs="trl"),
    }
