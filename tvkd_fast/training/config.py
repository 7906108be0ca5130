"""What a run is made of. Every field is a command-line option of the same name and a key in a recipe's YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from tvkd_fast.data import MicroBatching
from tvkd_fast.distributed import Recompute
from tvkd_fast.models.load import PACKAGED
from tvkd_fast.ops import HeadGradient
from tvkd_fast.training.ranges import FINITE, NOT_NEGATIVE, POSITIVE, SHARE, Range, at_least, check_numbers, number

C = TypeVar("C")

_PATHS = frozenset(
    {
        "compare",
        "eval",
        "eval_scores",
        "generate",
        "out",
        "output",
        "output_dir",
        "policy",
        "recipe",
        "reference",
        "scores",
        "teacher",
        "teacher_reference",
        "train",
    }
)
"""Fields, of whichever config, that may name a place on this machine."""


def at_home(config: Any) -> None:
    """`~` in a config's paths becomes the home directory, in place: neither YAML nor `--option=~/x` is a shell's."""
    for name in _PATHS & vars(config).keys():
        value = getattr(config, name)
        if isinstance(value, str):
            setattr(config, name, expanduser(value))
        elif isinstance(value, list):
            setattr(config, name, [expanduser(x) for x in value])


@dataclass(kw_only=True)
class DataConfig:
    """Preference data and how it becomes tokens."""

    train: str | None = None
    """Training pairs: hub name (`org/name`, `org/name:data_dir`), .jsonl(.gz) or .parquet file, `datasets` folder, or
    `bundled:train`."""
    eval: str | None = None
    """Held-out pairs, from the same kinds of places."""
    train_split: str = "train"
    """Split of a hub dataset, or of a folder, to train on; a split that does not exist lists those that do."""
    eval_split: str = "test"
    """Split of a hub dataset, or of a folder, to evaluate on."""
    subset: str | None = None
    """Configuration name of a hub dataset or of a copy of one, or a folder inside a folder."""
    train_limit: int | None = number(None, at_least(1))
    """Read only so many training rows."""
    eval_limit: int | None = number(None, at_least(1))
    """Read only so many held-out rows."""
    max_length: int = number(1024, at_least(2))
    """Most tokens of prompt and response together."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """What survives in a longer pair: `keep_start` cuts the responses' ends, `keep_end` the prompt's beginning."""
    overlong: Literal["error", "drop"] = "error"
    """A pair that cutting would leave without a response: stop, or drop and count it."""
    bad_pairs: Literal["error", "drop"] = "error"
    """A row that is no preference (empty, equal or unrelated responses): stop, or drop and count it."""
    chat_template: Literal["auto", "never"] = "auto"
    """`auto` writes conversations with the tokenizer's template, `never` as plain text."""
    teacher_chat_template: Literal["auto", "never"] = "auto"
    """The same for a teacher with another tokenizer; one with the policy's reads what the policy reads."""

    def __post_init__(self) -> None:
        at_home(self)
        check_numbers(self, "data")


@dataclass(kw_only=True)
class LossConfig:
    """The TVKD loss; see docs/method.md."""

    beta: float = number(0.1, POSITIVE)
    """β > 0: strength of the KL term."""
    alpha: float = number(1.0, FINITE)
    """α: strength and sign of the teacher's shaping; 0 is DPO."""
    gamma: float = number(1.0, SHARE)
    """γ in [0, 1]: discount of the shaping."""
    kappa: float = number(1.0, POSITIVE)
    """κ > 0: inverse temperature of the teacher's soft value."""
    value_scale: float | None = number(None, FINITE)
    """b: scale of the soft value; β where not given, as in the paper."""
    value_from: Literal["logits", "logprobs", "implicit_reward"] = "logits"
    """Soft value from the teacher's logits (the paper), its log-probabilities (needs κ ≠ 1), or its DPO reward so far
    (needs teacher_reference)."""
    terminal: Literal["last_content", "eos", "zero"] = "last_content"
    """Which state ends the shaping sum."""
    label_smoothing: float = number(0.0, Range(0, 0.5, without_high=True))
    """λ in [0, 0.5): share of preferences taken to be wrong."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss")
        if self.value_from == "logprobs" and self.kappa == 1.0:
            raise ValueError(
                "value_from='logprobs' is 0 everywhere at kappa=1: set --loss.kappa to another value, such as 0.7"
            )


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW, a linear warm-up and a cosine down to `final_lr_ratio`."""

    lr: float = number(1e-6, POSITIVE)
    """Peak learning rate."""
    betas: tuple[float, float] = number((0.9, 0.999), Range(0, 1, without_high=True))
    """AdamW's decay rates."""
    eps: float = number(1e-8, POSITIVE)
    """AdamW's ε."""
    weight_decay: float = number(0.0, NOT_NEGATIVE)
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    warmup_steps: int = number(0, at_least(0))
    """Steps of linear warm-up."""
    final_lr_ratio: float = number(0.1, SHARE)
    """Learning rate at the last step over the peak."""
    clip_norm: float = number(1.0, NOT_NEGATIVE)
    """Largest gradient norm; 0 leaves it alone."""

    def __post_init__(self) -> None:
        check_numbers(self, "optim")


@dataclass(kw_only=True)
class ModelConfig:
    """How models are loaded and run; shared by policy, reference and teacher."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights. Training wants float32 (see `autocast`); scores serve only runs of the same precision."""
    autocast: Literal["off", "bfloat16"] = "off"
    """Run the forward products in bfloat16 over float32 weights."""
    attn_implementation: str | None = None
    """transformers' attention: sdpa, eager, flash_attention_2 …; the model's default where not given."""
    packing: Literal["shared", "unshared", "padded"] = "shared"
    """How pairs become rows: `shared` computes a pair's prompt once (sdpa, eager or flex attention), `unshared` packs
    without padding, `padded` pads."""
    activation_checkpointing: Recompute = "none"
    """What is computed again in the backward: nothing, all of a block but its products (`selective`), or all of it
    (`full`)."""
    device: str = "auto"
    """`auto` takes a GPU where there is one."""
    threads: int = number(0, at_least(0))
    """CPU threads; 0 leaves torch's choice."""
    return_memory: bool = False
    """Give memory that is freed back to the system at once, on a CPU under glibc: less is held, and steps take longer
    (docs/scaling.md)."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model. Off unless asked for."""

    def __post_init__(self) -> None:
        check_numbers(self, "model")


@dataclass(kw_only=True)
class LoraConfig:
    """Adapters of low rank that learn in the policy's place, and the policy without them as its reference."""

    rank: int = number(0, at_least(0))
    """r of W + (alpha/r)·B·A; 0 trains the policy's own weights."""
    alpha: float | None = number(None, POSITIVE)
    """Scale; twice the rank where not given."""
    targets: list[str] | None = None
    """Names of the linear layers that get one, such as q_proj; all of the backbone where not given."""
    quantize: Literal["no", "nf4"] = "no"
    """Hold the frozen backbone in four bits a weight (QLoRA); needs bitsandbytes. One process."""

    def __post_init__(self) -> None:
        check_numbers(self, "lora")
        if self.quantize != "no" and self.rank == 0:
            raise ValueError(
                "a backbone in four bits does not learn, adapters beside it do: set --lora.rank, such as 16"
            )


@dataclass(kw_only=True)
class ParallelConfig:
    """How processes share a model, where there are several (`--nproc`, or torchrun)."""

    replicas: int = number(1, at_least(1))
    """Groups of processes that hold all weights each, sharded within a group (HSDP); 1 shards over all."""
    vocabulary: Literal["auto", "gathered", "shared"] = "auto"
    """The head: gathered by every process for its own tokens, or shared by rows to which the tokens of all are sent.
    `auto` shares it where those could not be more than the vocabulary."""
    cpu_offload: bool = False
    """Keep shards, gradients and the optimizer in the host's memory."""
    reduce: Literal["step", "micro_batch"] = "step"
    """When gradients are summed over processes: once a step, for which each holds whole gradients from one micro-batch
    to the next, or in each, for which it holds its shards alone."""
    timeout_s: float = number(600.0, POSITIVE)
    """Seconds that a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        check_numbers(self, "parallel")


@dataclass(kw_only=True)
class TrainConfig:
    """One training run: `tvkd train`."""

    policy: str
    """Model to train: a hub name, a folder, a .gguf file, or `smollm2-135m`."""
    output_dir: str
    """Folder of the run: metrics.jsonl, checkpoints, and the final model in `final/`."""
    objective: Literal["tvkd", "dpo", "sft"] = "tvkd"
    """Loss: tvkd, dpo (tvkd without a teacher), or sft on the chosen responses."""
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
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadGradient = field(default_factory=HeadGradient)
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
    """What a process's device can do, in 10¹² floating-point operations a second: metrics then have `mfu`."""
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
        check_numbers(self)
        if self.keep_best != "none" and (self.data.eval is None or not self.eval_every):
            raise ValueError("keep_best goes by evaluations: set --data.eval and --eval_every")
        if self.data.eval is None and (self.eval_every or self.eval_scores):
            raise ValueError("eval_every and eval_scores need held-out pairs: set --data.eval")
        check_teacher_reference(self.teacher, self.teacher_reference, self.loss)

    def check_keep_best(self) -> None:
        """ValueError where no checkpoint is of a step that is evaluated, or no evaluation has the figure."""
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
        if self.keep_best == "loss" and self.objective == "sft":
            raise ValueError("keep_best loss: evaluations under --objective sft have no loss; set accuracy or margin")
        if self.keep_best == "loss" and self.objective == "tvkd" and self.teacher is None and self.eval_scores is None:
            raise ValueError(
                "keep_best loss: evaluations have no loss where held-out pairs have no teacher's values; set "
                "--eval_scores or --teacher, or keep_best accuracy or margin"
            )

    @property
    def unkept_evaluations(self) -> bool:
        """Whether keep_best passes over some evaluations, whose steps are not saved."""
        return self.keep_best != "none" and self.save_every > self.eval_every


@dataclass(kw_only=True)
class ScoreConfig:
    """One scoring pass: `tvkd score`."""

    output_dir: str
    """Folder to write the scores to."""
    policy: str
    """The policy to be trained: its tokenizer makes the tokens."""
    teacher: str | None = None
    """Teacher whose soft values to keep; none for DPO's reference alone."""
    teacher_reference: str | None = None
    """The teacher's own reference: keep the teacher's rewards instead, for loss.value_from implicit_reward."""
    reference: str | None = None
    """Reference whose log-probabilities to keep; the policy where not given."""
    student_layers: int | None = number(None, at_least(1))
    """As in `tvkd train`: the reference is the policy pruned to so many layers."""
    kappa: float = number(1.0, POSITIVE)
    """κ of the soft values; alpha, gamma, terminal and value_scale can be chosen later."""
    which: Literal["train", "eval"] = "train"
    """Which of data.train and data.eval to score."""
    value_dtype: Literal["float32", "float16"] = "float32"
    """Dtype in which the teacher's sums are kept: 4 or 2 bytes a response state, twice that where kappa is not 1."""
    pairs_per_shard: int = number(512, at_least(1))
    """Pairs a file: a pass that was killed goes on after the last whole one."""
    tokens_per_micro_batch: int = number(2048, at_least(1))
    """Most tokens that go through a model at once, of whole pairs."""
    pairs_per_micro_batch: int = number(8, at_least(1))
    """The same in pairs, where model.packing is `padded`."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    nproc: int = number(1, at_least(1))
    """Processes to start on this machine; pairs and weights are shared among them."""

    def __post_init__(self) -> None:
        at_home(self)
        check_numbers(self)
        if self.teacher_reference is not None and self.teacher is None:
            raise ValueError("--teacher_reference is the reference of a teacher: set --teacher")


@dataclass(kw_only=True)
class EvalConfig:
    """One evaluation: `tvkd eval`."""

    policy: str
    """Model to evaluate."""
    reference: str | None = None
    """Reference for the rewards; without it log-probabilities themselves are compared."""
    teacher: str | None = None
    """Teacher for the shaping margins and their diagnostics; needs a reference."""
    teacher_reference: str | None = None
    """The teacher's own reference, for loss.value_from implicit_reward."""
    output: str | None = None
    """File to append the JSON line to, beside printing it."""
    format: Literal["pairs", "rewardbench"] = "pairs"
    """`rewardbench`: columns prompt, chosen, rejected and subset; a table of its subsets and sections. Of lists of
    answers, as RewardBench 2 has them, each chosen one must beat each rejected one."""
    compare: list[str] = field(default_factory=list)
    """More models, over the same reference: a table of all, and a paired test of each beside the policy."""
    reference_free: Literal["mean", "sum", "norm"] = "mean"
    """What a response scores in such a table without a reference: its tokens' mean log-probability, their sum, or the
    negative of their norm."""
    generate: str | None = None
    """Folder for answers.md and answers.html: greedy answers to held-out prompts, the models side by side."""
    generate_prompts: int = number(20, at_least(1))
    """How many prompts are answered, evenly spaced over the held-out ones."""
    max_new_tokens: int = number(128, at_least(1))
    """Most tokens of an answer."""
    tokens_per_micro_batch: int = number(2048, at_least(1))
    """Most tokens that go through a model at once, of whole pairs."""
    pairs_per_micro_batch: int = number(8, at_least(1))
    """The same in pairs, where model.packing is `padded`."""
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    nproc: int = number(1, at_least(1))
    """Processes to start on this machine; pairs and weights are shared among them."""

    def __post_init__(self) -> None:
        at_home(self)
        check_numbers(self)
        check_teacher_reference(self.teacher, self.teacher_reference, self.loss)
        if self.tabled and self.teacher is not None:
            raise ValueError("a table of models tells who is right, and has no shaping: leave out --teacher")

    @property
    def tabled(self) -> bool:
        """Whether models are told by a table of who is right, and not by one policy's figures."""
        return self.format == "rewardbench" or bool(self.compare)


@dataclass(kw_only=True)
class ExplainConfig:
    """One pair under a teacher: `tvkd explain`."""

    teacher: str
    """The teacher; its tokenizer makes the tokens."""
    teacher_reference: str | None = None
    """The teacher's own reference, for loss.value_from implicit_reward."""
    output_dir: str
    """Folder for explain.html and explain.png."""
    pair: int = number(0, at_least(0))
    """Which of the held-out pairs, counted from 0."""
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        at_home(self)
        check_numbers(self)
        check_teacher_reference(self.teacher, self.teacher_reference, self.loss)


def check_teacher_reference(teacher: str | None, teacher_reference: str | None, loss: LossConfig) -> None:
    """Both or neither: rewards are of a teacher over its own reference."""
    wanted = loss.value_from == "implicit_reward"
    if teacher is not None and wanted and teacher_reference is None:
        raise ValueError(
            "value_from='implicit_reward' is what the teacher gained over its own reference, the model that it was "
            "before DPO: set --teacher_reference"
        )
    if teacher_reference is not None and not (wanted and teacher is not None):
        raise ValueError(
            "--teacher_reference serves --teacher under --loss.value_from implicit_reward: set all or none"
        )


def micro_batching(config: TrainConfig | ScoreConfig | EvalConfig) -> MicroBatching:
    """How the run's pairs become micro-batches."""
    return MicroBatching(config.model.packing, config.tokens_per_micro_batch, config.pairs_per_micro_batch)


def to_record(config: Any) -> dict[str, Any]:
    """The config as JSON keeps it. Files and folders of this machine are absolute paths, so that they are found from
    another working directory too; hub names stay as they are."""
    return {
        f.name: to_record(value)
        if is_dataclass(value := getattr(config, f.name))
        else _absolute(value)
        if f.name in _PATHS
        else value
        for f in fields(config)
    }


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    is_local = isinstance(value, str) and value not in PACKAGED and Path(value).exists()
    return str(Path(value).absolute()) if is_local else value


def from_record(kind: type[C], record: Mapping[str, Any]) -> C:
    """A config out of what `to_record` made of it, and JSON kept."""
    types = get_type_hints(kind)
    given: dict[str, Any] = {}
    for name, value in record.items():
        expected = types[name]
        if is_dataclass(expected) and isinstance(expected, type):
            given[name] = from_record(expected, value)
        else:
            given[name] = tuple(value) if get_origin(expected) is tuple else value
    return kind(**given)
