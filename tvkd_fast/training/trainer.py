"""The loop around the step: order of pairs, learning rate, metrics, evaluation, checkpoints, resume."""

from __future__ import annotations

import json
import math
import random
import time
import warnings
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.data import PairBatch, PairDataset, pairs_of_epochs, pairs_of_step
from tvkd_fast.data.order import check_step
from tvkd_fast.data.step_pairs import StepPairs
from tvkd_fast.distributed import World
from tvkd_fast.evaluation.evaluate import Evaluation
from tvkd_fast.evaluation.held_out import evaluate_held_out
from tvkd_fast.files import written
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.objectives import Need
from tvkd_fast.ops import HeadStats
from tvkd_fast.rollout import Rollouts, Sampler
from tvkd_fast.scoring.scorer import Scorer
from tvkd_fast.scoring.timed import TimedScorer
from tvkd_fast.training.checkpoint import Checkpoints, check_same_run, read_state, set_aside
from tvkd_fast.training.metrics import METRICS, RESUMES, Interval, MetricsLog, ShapingWatch, progress_bar
from tvkd_fast.training.optim import learning_rate, make_optimizer, set_learning_rate
from tvkd_fast.training.record import to_record
from tvkd_fast.training.selector import Selected, Selector, selection_metrics
from tvkd_fast.training.signals import Stopped, StopSignal
from tvkd_fast.training.step import StepOutput, train_step
from tvkd_fast.training.train_config import TrainConfig, micro_batching
from tvkd_fast.training.usage import StepFlops, peak_bytes

CHECKPOINTS = "checkpoints"
NONFINITE = "nonfinite-step-{:06d}.json"
"""The step, its pairs and the run's config, for `tvkd replay`."""
NAMED_ROWS = 8
"""The number of rows that the error of a step that is not finite names; the record lists all of them."""


class Trainer:
    """Trains `policy` on `dataset`; `run` returns the last evaluation.

    Args:
        config: the run. Its data and model fields were used to make the other arguments and are only recorded.
        policy: on its device; its parameters are what is trained.
        scorer: scores training pairs by reference and teacher.
        dataset: training pairs, or prompts alone where all steps sample.
        held_out: pairs to evaluate on, with a scorer of their own (or None: the policy alone is evaluated).
        sampler: the policy as one that samples, where `config.sampled_share` of the steps learn from its responses.
        identity: names and fingerprints that a checkpoint must share to be resumed from.
        show_progress: draw a progress bar on stderr.
        world: the processes that share the policy; each of them runs a trainer of the same arguments.
        stop: a wish to end early, looked at after every step.
        selection_scorer: scores the pairs that a selection chooses from; `scorer` where not given.
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
        sampler: Sampler | None = None,
        identity: dict[str, Any] | None = None,
        show_progress: bool = True,
        world: World | None = None,
        stop: StopSignal | None = None,
        selection_scorer: Scorer | None = None,
    ) -> None:
        self.config, self.policy, self.dataset = config, policy, dataset
        self.scorer: Scorer = scorer
        self.held_out, self.held_out_scorer = held_out, held_out_scorer
        self.world = World(next(policy.parameters()).device) if world is None else world
        self.stop = StopSignal() if stop is None else stop
        self.batching, self.show_progress = micro_batching(config), show_progress and self.world.first
        policy.head.gradient, policy.head.stats = config.head, HeadStats()
        self.folder = Path(config.output_dir)
        self.total_pairs = None if config.max_steps else pairs_of_epochs(config.epochs, len(dataset))
        """The pairs of a run that is measured in passes; its last step may be short."""
        self.max_steps = config.max_steps or math.ceil((self.total_pairs or 0) / config.pairs_taken)
        self.optimizer = make_optimizer(policy, config.optim)
        self.flops = StepFlops(policy)
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, self.world, keep=config.keep_checkpoints)
        check_step(config.pairs_per_step, dataset, taken=config.pairs_taken)
        rule = config.data.selection
        self.selector = None
        if rule is not None:
            read = scorer if selection_scorer is None else selection_scorer
            self.selector = Selector(rule, policy, read, dataset, config.loss, self.batching, self.world)
        self._selected: dict[int, Selected] = {}
        """What the steps since the last line of metrics kept."""
        self.data: StepPairs | Rollouts = StepPairs(
            dataset,
            self.batching,
            self._pairs,
            chosen_only=Need.REJECTED not in config.loss.needs,
            rank=self.world.rank,
            size=self.world.size,
        )
        if sampler is not None:
            self.scorer = timed = TimedScorer(scorer)
            self.data = Rollouts(
                self.data,
                sampler,
                config.rollout,
                share=config.sampled_share,
                seed=config.seed,
                steps=self.max_steps,
                world=self.world,
                scorer=timed,
            )
        self._unseen: list[tuple[int, Tensor]] = []
        """Steps, and whether each was finite, that nobody has looked at yet."""
        self.trained = False
        """Whether `run` has taken a step, and was not finished before."""
        self.identity = {"dataset": dataset.fingerprint, **_trajectory(config), **(identity or {})}

    def run(self) -> Evaluation | None:
        """Train from where the newest whole checkpoint left off. Raises Stopped after a signal, once all is saved."""
        done = self._resume()
        if done >= self.max_steps:
            if self.world.first:
                print(f"{self.folder}: all {self.max_steps} steps are finished already; nothing was done")
            return None
        log = self._log(done) if self.world.first else None
        self.policy.train()
        watch = ShapingWatch(skip=20)
        evaluation = None
        interval, busy, waited, pairs = Interval(), 0.0, 0.0, 0
        bar = progress_bar(self.max_steps, done, description=self.config.objective, enabled=self.show_progress)
        with bar, closing(self.checkpoints), nullcontext() if log is None else closing(log):
            for step in range(done, self.max_steps):
                start = time.perf_counter()
                pairs += len(self._pairs(step))
                chosen = time.perf_counter()
                batches = self._batches(step)
                waited += time.perf_counter() - chosen
                lr = self._set_learning_rate(step)
                out = self._step(step, batches)
                self.trained = True
                number = step + 1
                busy += time.perf_counter() - start
                interval.add(out, batches, capacity=sum(map(self.batching.capacity, batches)))
                last = number == self.max_steps
                if number % self.config.log_every == 0 or last:
                    self._refuse_nonfinite()
                    numbers = interval.read(self.world)
                    if self.world.first:
                        watch.look(number, numbers, last=last)
                    metrics = {"step": number, **numbers.metrics(), "lr": lr}
                    metrics |= self._speed(numbers.tokens, numbers.response_tokens, pairs, busy, waited)
                    metrics |= self._head_metrics() | self.data.metrics(busy)
                    if self._selected:
                        metrics |= selection_metrics(list(self._selected.values()))
                        self._selected.clear()
                    self._write(log, metrics)
                    bar.set_postfix(_shown(metrics), refresh=False)
                    busy, waited, pairs = 0.0, 0.0, 0
                bar.update()
                scored = None
                if self.held_out is not None and (last or _due(number, self.config.eval_every)):
                    scored = evaluation = self._evaluate()
                    self._write(log, {"step": number} | {f"eval/{k}": v for k, v in evaluation.known().items()})
                stopped_by = 0 if last else self.stop.agreed(self.world)
                if self.config.save_every >= 0 and (last or stopped_by or _due(number, self.config.save_every)):
                    self._save(number, scored)
                if stopped_by:
                    self._refuse_nonfinite()
                    self.checkpoints.wait()
                    raise Stopped(stopped_by, number, saved=self.config.save_every >= 0)
            self.checkpoints.wait()
        return evaluation

    def _step(self, step: int, batches: list[PairBatch]) -> StepOutput:
        out = train_step(
            self.policy,
            self.scorer,
            batches,
            self.optimizer,
            self.config.loss,
            clip_norm=self.config.optim.clip_norm,
            world=self.world,
            skip_nonfinite=True,
            mismatched=self._mismatched(step),
        )
        if self.config.nonfinite == "stop":
            self._unseen.append((step, out.finite))
        return out

    def _refuse_nonfinite(self) -> None:
        """Raise FloatingPointError, and leave a record, where a step since the last look was not finite.

        It is asked where the host waits anyway: before a line of metrics, an evaluation and a checkpoint.
        """
        if not self._unseen:
            return
        finite = torch.stack([flag for _, flag in self._unseen]).tolist()
        step = next((step for (step, _), right in zip(self._unseen, finite, strict=True) if not right), None)
        later = sum(finite[finite.index(False) :]) if step is not None else 0
        self._unseen.clear()
        if step is None:
            return
        self.checkpoints.wait()
        path, pairs = self.folder / NONFINITE.format(step), sorted(self._pairs(step))
        samples = [{"pair": i, "ids": " ".join(map(str, ids))} for i, ids in self.data.samples(step)]
        if self.world.first:
            record = {"step": step, "pairs": pairs, "config": to_record(self.config)}
            record |= {"samples": samples} if samples else {}
            with written(path, RESUMES):
                self.folder.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=2) + "\n")
        raise FloatingPointError(self._nonfinite(step, pairs, path, later, sampled=bool(samples)))

    def _nonfinite(self, step: int, pairs: list[int], record: Path, later: int, *, sampled: bool) -> str:
        """Describe a step that is not finite: which step, which rows, what was done after it, and what to try."""
        rows = list(dict.fromkeys(self.dataset[i].row for i in pairs))
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        newest = self.checkpoints.newest()
        kept = "there is no checkpoint to resume from" if newest is None else f"the newest checkpoint is {newest.name}"
        after = f" ({later} more were taken before anybody looked)" if later else ""
        replay = (
            "" if Need.REJECTED not in self.config.loss.needs else f"`tvkd replay {record}` says which of them it is. "
        )
        remedy = "Take out a row that is not finite alone; else lower"
        if sampled:
            replay, remedy = f"{record} holds the responses that were sampled for them. ", "Lower"
        return (
            f"the loss or the gradient of step {step + 1} is NaN or inf, and the weights were left as they were before "
            f"it{after}. Its rows: {', '.join(rows[:NAMED_ROWS])}{more}. {replay}{remedy} --optim.lr or raise "
            f"--optim.warmup_steps, or pass such steps over by --nonfinite skip ({kept})"
        )

    def _speed(self, tokens: int, response_tokens: int, pairs: int, busy: float, waited: float) -> dict[str, float]:
        """Return the speed over an interval of `busy` seconds, of which `waited` were spent waiting for batches."""
        speed = {
            "tokens_per_s": tokens / busy,
            "pairs_per_s": pairs / busy,
            "data_wait": waited / busy,
            "peak_memory_gb": self.world.all_reduce_max(peak_bytes(self.world.device)) / 1e9,
        }
        if self.config.peak_tflops is not None:
            could = self.config.peak_tflops * 1e12 * self.world.size * busy
            speed["mfu"] = self.flops.of(tokens, response_tokens) / could
        return speed

    def _log(self, done: int) -> MetricsLog:
        config = asdict(self.config)
        return MetricsLog(self.folder, resume_from=done, trackers=self.config.trackers, config=config)

    def _write(self, log: MetricsLog | None, metrics: dict[str, Any]) -> None:
        if log is not None:
            log.write(metrics)

    def _resume(self) -> int:
        """Restore the newest whole checkpoint of this run, and return the number of steps that it has done."""
        torch.manual_seed(self.config.seed)
        random.seed(self.config.seed)
        if not self.config.resume and self.world.first:
            set_aside(self.checkpoints.folder)
            set_aside(self.folder / METRICS)
        path = self.checkpoints.newest()
        if path is None:
            return 0
        if self.show_progress:
            print(f"resuming from {path}")
        check_same_run(path, self.identity)
        self.checkpoints.load(path, self.policy, self.optimizer)
        state = read_state(path)
        self.data.load(state)
        return int(state["step"])

    def _save(self, step: int, evaluation: Evaluation | None) -> None:
        self._refuse_nonfinite()
        by = self.config.keep_best
        extra: dict[str, Any] = {"identity": self.identity, "config": to_record(self.config)} | self.data.state(step)
        if self.held_out is not None and by != "none":
            extra["scored_on"] = [by, self.held_out.fingerprint]
        figure = None if evaluation is None or by == "none" else getattr(evaluation, by)
        score = None if figure is None else -figure if by == "loss" else figure
        if score is not None and not math.isfinite(score) and self.world.first:
            warnings.warn(
                f"eval/{by} is {figure} at step {step}: its checkpoint is never the best by keep_best {by}; score the "
                "held-out pairs by `tvkd eval` to see which of them is not finite",
                stacklevel=2,
            )
        self.checkpoints.save(step, self.policy, self.optimizer, extra, score=score)

    def _pairs(self, step: int) -> list[int]:
        """Return the pairs of a step, over all processes."""
        seed, each = self.config.seed, self.config.pairs_taken
        taken = pairs_of_step(seed, step, num_pairs=len(self.dataset), pairs_per_step=each, total=self.total_pairs)
        if self.selector is None:
            return taken
        if step not in self._selected:
            # The last step of a run may take fewer.
            count = max(1, round(len(taken) * self.config.pairs_per_step / each))
            self._selected[step] = self.selector.of(step, taken, count, seed=seed)
        return self._selected[step].pairs

    def _batches(self, step: int) -> list[PairBatch]:
        """This process's micro-batches of a step, as the objective changes them."""
        changed = (self.config.loss.changed(batch, self.config.seed, step) for batch in self.data.batches(step))
        return [batch.to(self.world.device) for batch in changed]

    def _mismatched(self, step: int) -> list[PairBatch]:
        """Return the step's responses to other prompts, where the objective reads them."""
        if Need.LABELS not in self.config.loss.needs:
            return []
        found = self.batching.share_rejected(
            self.dataset, self._pairs(step), rank=self.world.rank, size=self.world.size
        )
        return [batch.to(self.world.device) for batch in found]

    def _set_learning_rate(self, step: int) -> float:
        lr = learning_rate(step, self.max_steps, self.config.optim)
        set_learning_rate(self.optimizer, lr)
        return lr

    def _head_metrics(self) -> dict[str, float]:
        """Return statistics of the sparse gradients since the last line; none where gradients were exact.

        Where the vocabulary is shared, they are those of each process's own rows.
        """
        stats = self.policy.head.stats
        assert stats is not None
        all_sums = HeadStats()
        for sums in self.world.all_gather(None if stats.sums is None else stats.sums.cpu()):
            if sums is not None:
                all_sums.add(sums)
        stats.reset()
        return all_sums.read()

    def _evaluate(self) -> Evaluation:
        assert self.held_out is not None
        self._refuse_nonfinite()
        return evaluate_held_out(
            self.policy,
            self.held_out,
            scorer=self.held_out_scorer,
            objective=self.config.loss,
            batching=self.batching,
            world=self.world,
        )


def _trajectory(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine a run's course. Resume requires identical values."""
    names = ("objective", "seed", "pairs_per_step", "max_steps", "epochs")
    return {name: getattr(config, name) for name in names} | {
        "loss": config.loss.settings(),
        "optim": asdict(config.optim),
        "head": asdict(config.head),
        "lora": asdict(config.lora),
        **({"rollout": asdict(config.rollout)} if config.sampled_share else {}),
        **({} if config.data.selection is None else {"selection": asdict(config.data.selection)}),
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _shown(metrics: dict[str, Any]) -> dict[str, str]:
    shown = {"loss": f"{metrics['loss']:.3f}"}
    if "accuracy" in metrics:
        shown["acc"] = f"{metrics['accuracy']:.2f}"
    return shown | {"tok/s": f"{metrics['tokens_per_s']:,.0f}"}
