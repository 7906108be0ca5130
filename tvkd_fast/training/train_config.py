"""The settings of a training run. Every field is an option of `tvkd train` and a key in a recipe's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from tvkd_fast.data import MicroBatching
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.distributed.parallel_config import ParallelConfig
from tvkd_fast.files import at_home
from tvkd_fast.models.settings import LoraConfig, ModelConfig
from tvkd_fast.objectives import DEFAULT, TEACHER, Need, Objective, settings_of
from tvkd_fast.objectives.checks.fitting import check_labels, check_rewards, check_selection, check_teacher_reference
from tvkd_fast.ops import HeadGradient
from tvkd_fast.ranges import POSITIVE, at_least, check_numbers, number
from tvkd_fast.rollout.rollout_config import RolloutConfig
from tvkd_fast.training.optim import OptimConfig


@dataclass(kw_only=True)
class TrainConfig:
    """The settings of one training run: `tvkd train`."""

    policy: str
    """Model to train: a hub name, a folder, a .gguf file, or `smollm2-135m`."""
    output_dir: str
    """Folder of the run: metrics.jsonl, checkpoints, and the final model in `final/`."""
    objective: str = DEFAULT
    """What the policy is trained for; each objective has its own --loss settings (docs/objectives.md)."""
    teacher: str | None = None
    """DPO-trained teacher, of any tokenizer; needed by tvkd unless its scores are given."""
    teacher_reference: str | None = None
    """What the teacher was before DPO: its own reference, for loss.value_from implicit_reward."""
    reference: str | None = None
    """Frozen reference; the policy at the start where not given."""
    student_layers: int | None = number(None, at_least(1))
    """Prune the policy to so many evenly spaced layers before training."""
    scores: str | None = None
    """Folder that `tvkd score` wrote for the training data: teacher and reference need not be given then, and are only
    compared with it if they are."""
    eval_scores: str | None = None
    """The same for the held-out data (`tvkd score --which eval`); scored at the start of the run where not given."""
    data: DataConfig = field(default_factory=DataConfig)
    loss: Objective = field(default_factory=Objective)
    """The objective's settings; its defaults where not given."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadGradient = field(default_factory=HeadGradient)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    nproc: int = number(1, at_least(1))
    """Processes to start on this machine; weights are sharded over them. Under torchrun its own number counts."""
    max_steps: int | None = number(None, at_least(1))
    """Optimizer steps; `epochs` over the data where not given."""
    epochs: float = number(1.0, POSITIVE)
    """Passes over the training pairs, where max_steps is not given: each takes every pair once, and the last step those
    that are left."""
    pairs_per_step: int = number(32, at_least(1))
    """Global batch: pairs an optimizer step averages over."""
    tokens_per_micro_batch: int = number(2048, at_least(1))
    """Most tokens that go through a model at once, of whole pairs."""
    pairs_per_micro_batch: int = number(4, at_least(1))
    """The same in pairs, where model.packing is `padded`."""
    eval_every: int = number(0, at_least(0))
    """Evaluate every so many steps; 0 only at the end. Needs data.eval."""
    save_every: int = number(0, at_least(-1))
    """Checkpoint every so many steps and at the end; 0 only at the end; -1 never."""
    keep_checkpoints: int = number(2, at_least(1))
    """How many of the newest checkpoints stay on disk."""
    keep_best: Literal["accuracy", "margin", "loss", "none"] = "none"
    """Keep one more: the checkpoint whose evaluation, made at the same step, was best by this figure; `tvkd export`
    makes a model of it."""
    log_every: int = number(1, at_least(1))
    """Write metrics every so many steps, over all of them."""
    trackers: list[Literal["wandb", "trackio"]] = field(default_factory=list)
    """Where else metrics go; metrics.jsonl always, and TensorBoard's files where it is installed."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or inf: stop and keep its pairs for `tvkd replay`, or pass it over and count
    it."""
    peak_tflops: float | None = number(None, POSITIVE)
    """Peak of a process's device, in 10¹² floating-point operations per second: metrics then have `mfu`."""
    resume: bool = True
    """Go on from the newest complete checkpoint in output_dir, if there is one; false sets those aside and starts
    again."""
    seed: int = number(0, at_least(0))
    """Seed of the order of pairs and of every generator."""
    device_memory_gib: float | None = number(None, POSITIVE)
    """What a process's device holds, for a dry run to compare with; a GPU that is here is asked."""
    dry_run: bool = False
    """Print the plan (models, tokens, memory by part, steps) and stop."""

    def __post_init__(self) -> None:
        at_home(self)
        self.loss = settings_of(self.objective, self.loss)
        check_numbers(self)
        if self.keep_best != "none" and (self.data.eval is None or not self.eval_every):
            raise ValueError("keep_best goes by evaluations: set --data.eval and --eval_every")
        if self.data.eval is None and (self.eval_every or self.eval_scores):
            raise ValueError("eval_every and eval_scores need held-out pairs: set --data.eval")
        check_teacher_reference(self.teacher, self.teacher_reference, self.loss)
        check_rewards(self.data.rewards, self.loss)
        check_labels(self.data.unpair, self.loss)
        check_selection(self.data.select, self.loss)

    @property
    def needs(self) -> frozenset[Need]:
        """What training reads: the objective's needs, and the teacher's log-probabilities for a selection."""
        return self.loss.needs if self.data.selection is None else self.loss.needs | {Need.TEACHER_LOGPS}

    @property
    def pairs_taken(self) -> int:
        """The pairs that a step takes, some of which a selection leaves out."""
        rule = self.data.selection
        return self.pairs_per_step if rule is None else rule.taken(self.pairs_per_step)

    def check_keep_best(self) -> None:
        """Raise ValueError where no step is both evaluated and saved, or no evaluation has the figure."""
        if self.keep_best == "none":
            return
        if self.save_every < 1:
            raise ValueError(
                f"keep_best {self.keep_best} keeps the checkpoint of the best evaluation, and with --save_every "
                f"{self.save_every} there is none but the last: set --save_every {self.eval_every}, as --eval_every"
            )
        if self.eval_every % self.save_every and self.save_every % self.eval_every:
            raise ValueError(
                f"keep_best {self.keep_best} keeps the checkpoint of the best evaluation, and evaluations every "
                f"{self.eval_every} steps hardly ever meet checkpoints every {self.save_every}: set --save_every "
                f"{self.eval_every}, as --eval_every"
            )
        needs = self.loss.needs
        if self.keep_best == "loss" and needs & TEACHER and self.teacher is None and self.eval_scores is None:
            raise ValueError(
                "keep_best loss: evaluations have no loss where held-out pairs have no teacher's values; set "
                "--eval_scores or --teacher, or keep_best accuracy or margin"
            )

    @property
    def sampled_share(self) -> float:
        """The share of steps over samples of the policy."""
        return float(self.loss.on_policy) if self.rollout.share is None else self.rollout.share

    @property
    def unkept_evaluations(self) -> bool:
        """Whether keep_best passes over some evaluations, whose steps are not saved."""
        return self.keep_best != "none" and self.save_every > self.eval_every


class _Batched(Protocol):
    model: ModelConfig
    tokens_per_micro_batch: int
    pairs_per_micro_batch: int


def micro_batching(config: _Batched) -> MicroBatching:
    """Return the rule that divides the run's pairs into micro-batches."""
    return MicroBatching(config.model.packing, config.tokens_per_micro_batch, config.pairs_per_micro_batch)
