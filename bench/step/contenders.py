"""The contenders of `bench.step`: each trains in a process of its own, and takes a step when it is its turn.

Letters: P pairs.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.commands.models import load_policy
from tvkd_fast.data import MicroBatching, PairBatch, TokenizedPair
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.model_config import ModelConfig
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.ops import HeadGradient
from tvkd_fast.scoring.cache import Scores
from tvkd_fast.training.optim import OptimConfig, make_optimizer
from tvkd_fast.training.step import train_step
from tvkd_fast.training.usage import process_bytes

BETA, LR, CLIP = 0.1, 1e-6, 1.0


@dataclass(frozen=True)
class Job:
    """What everybody trains: one start, the same pairs step by step, and what the reference says of them."""

    start: str
    """Folder of the model."""
    pairs: list[TokenizedPair]
    ref_logps: Tensor
    """[P, 2] float32."""
    pairs_per_step: int
    batching: MicroBatching
    """Ours."""
    threads: int
    folder: str
    """For whatever a trainer leaves behind."""

    @property
    def steps(self) -> int:
        return len(self.pairs) // self.pairs_per_step

    def of_step(self, step: int) -> range:
        return range(step * self.pairs_per_step, (step + 1) * self.pairs_per_step)


class Turns:
    """A contender's side: it says what it found before, then waits for its turn, and says what a step was."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def ready(self, logps: Tensor) -> None:
        """`logps` [P, 2] of the first step's pairs, from the start."""
        self.connection.send(logps)

    def begin(self) -> None:
        if self.connection.recv() == "first":
            Path("/proc/self/clear_refs").write_text("5")
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self.since

    def end(self, loss: float, grad_norm: float) -> None:
        self.connection.send({"seconds": self.seconds, "loss": loss, "grad_norm": grad_norm, "peak_mb": peak_mb()})


Run = Callable[[Job, Turns], None]


class Stepper:
    """The other side: a contender's process."""

    def __init__(self, run: Run, job: Job) -> None:
        # Spawned, not forked: threads do not survive a fork, and whatever the parent holds would be the child's peak.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(run, job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.logps: Tensor = self._answer()
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        self.connection.send("next" if self.steps else "first")
        self.steps.append(self._answer())

    def close(self) -> None:
        self.process.terminate()
        self.process.join()

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the process died ({self.process.exitcode}): out of memory?") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(run: Run, job: Job, connection: Connection) -> None:
    torch.set_num_threads(job.threads)
    try:
        run(job, Turns(connection))
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def peak_mb() -> float:
    return process_bytes("VmHWM") / 2**20


class Given:
    """A scorer of what is known already."""

    def __init__(self, ref_logps: Tensor) -> None:
        self.ref_logps = ref_logps

    def of(self, batch: PairBatch) -> Scores:
        return Scores(self.ref_logps[batch.pairs].T.flatten(), None, None)


@torch.no_grad()
def logps_of(policy: PolicyWithHead, job: Job, which: range) -> Tensor:
    """[P, 2] summed log-probabilities of these pairs' chosen and rejected responses."""
    found = torch.empty(len(which), 2)
    for batch in job.batching.batches(job.pairs, which):
        found[batch.pairs - which.start] = segment_sums(policy(batch), batch.cu_seqlens).view(2, -1).T
    return found


def ours(gradient: HeadGradient, tokens: int | None, job: Job, turns: Turns) -> None:
    """Our step, in rows of at most `tokens` tokens where the job's own budget is not wanted."""
    batching = job.batching if tokens is None else replace(job.batching, tokens=tokens)
    policy = load_policy(job.start, ModelConfig(packing=job.batching.packing))
    policy.head.gradient = gradient
    turns.ready(logps_of(policy, job, job.of_step(0)))
    optim = OptimConfig(lr=LR, clip_norm=CLIP)
    optimizer = make_optimizer(policy, optim)
    policy.train()
    for step in range(job.steps):
        turns.begin()
        out = train_step(
            policy,
            Given(job.ref_logps),
            list(batching.batches(job.pairs, job.of_step(step))),
            optimizer,
            DPO(beta=BETA),
            clip_norm=CLIP,
        )
        turns.stop()
        turns.end(float(out.loss), float(out.grad_norm))


def trl(batch_size: int, job: Job, turns: Turns) -> None:
    """TRL's own trainer over our token ids, `batch_size` pairs a micro-batch."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    losses: list[Tensor] = []

    class Turn(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()
            losses.clear()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "grad_norm" in logs:
                turns.end(float(sum(losses)), float(logs["grad_norm"]))

    class Trainer(DPOTrainer):  # type: ignore[misc]
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
        "prompt_ids": [pair.prompt_ids for pair in job.pairs],
        "chosen_ids": [pair.chosen_ids for pair in job.pairs],
        "rejected_ids": [pair.rejected_ids for pair in job.pairs],
        "ref_chosen_logps": job.ref_logps[:, 0].tolist(),
        "ref_rejected_logps": job.ref_logps[:, 1].tolist(),
    }
    config = DPOConfig(
        output_dir=job.folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=job.pairs_per_step // batch_size,
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
        model=AutoModelForCausalLM.from_pretrained(job.start),
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(job.start),
        callbacks=[Turn()],
    )
    found = []
    for first in range(0, job.pairs_per_step, batch_size):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(first, first + batch_size)])
        with torch.no_grad():
            found.append(torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), 1))
    turns.ready(torch.cat(found))
    trainer.train()
