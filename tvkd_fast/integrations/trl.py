"""TRL's DPOTrainer with a teacher: `TVKDTrainer` and `TVKDConfig` in place of `DPOTrainer` and `DPOConfig`.

Ψ does not depend on the policy, so log π_ref + (α/β)Ψ in place of log π_ref turns a loss of DPO's margin into TVKD's:
β[(log π_w − log π_ref,w − (α/β)Ψ_w) − (… l …)] = β[ρ_w − ρ_l] − α[Ψ_w − Ψ_l]. TRL's own code computes it, unmodified.

Letters: P pairs of a batch (2P rows, chosen first), L row length.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from inspect import getclosurevars
from os import PathLike, fspath
from types import FunctionType
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import global_then_local_main_first

from tvkd_fast.data.response_end import ResponseEnds
from tvkd_fast.integrations.lm_head import FusedLMOutput, answering, patch_lm_head, unpatch_lm_head
from tvkd_fast.integrations.patched import model_inside
from tvkd_fast.integrations.returns import IDS, MARK, RETURNS, Maker, without_returns
from tvkd_fast.integrations.rows import (
    RESPONSES,
    ROW,
    RowReader,
    WithReturns,
    as_pairs,
    checked_rows,
    long_prompts_dropped,
    read_rows,
)
from tvkd_fast.integrations.scores import CachedReturns, is_score_folder
from tvkd_fast.integrations.teacher import ShapingSettings, TeacherReturns
from tvkd_fast.losses import Terminal, check_discount, check_preference_settings
from tvkd_fast.models import (
    fingerprint_settings,
    load_model,
    load_stop_ids,
    load_tokenizer,
    longest_sequence,
    read_config,
    stop_ids_of,
)
from tvkd_fast.models.lent import adapter_layers, adapter_parameters
from tvkd_fast.ops import HeadGradient, HeadStats, check_kappa

OF_MARGINS = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""TRL's losses that see the pair's margin alone, or no reference at all."""


@dataclass
class TVKDConfig(DPOConfig):
    """DPOConfig and the shaping; with `alpha=0`, or without a teacher, a run is DPO's own."""

    alpha: float = field(default=1.0, metadata={"help": "α: strength and sign of the teacher's shaping; 0 is DPO."})
    gamma: float = field(default=1.0, metadata={"help": "γ in [0, 1]: discount of the shaping."})
    kappa: float = field(default=1.0, metadata={"help": "κ > 0: inverse temperature of the teacher's soft value."})
    value_scale: float | None = field(
        default=None, metadata={"help": "b: scale of the soft value; `beta` where not given, as in the paper."}
    )
    value_from: Literal["logits", "logprobs", "implicit_reward"] = field(
        default="logits", metadata={"help": "What the soft value is made of; docs/method.md."}
    )
    terminal: Terminal = field(default="last_content", metadata={"help": "Which state ends the shaping sum."})
    precompute_teacher: bool = field(
        default=True,
        metadata={
            "help": "Run the teacher once over the data before training, and keep two numbers a pair; otherwise it "
            "runs on every batch, as it must over an IterableDataset."
        },
    )
    fused_head: Literal["auto", "tvkd", "trl"] = field(
        default="auto",
        metadata={
            "help": "Whose vocabulary head computes log-probabilities: `auto` takes this library's on a CPU and TRL's "
            "elsewhere."
        },
    )
    grad_mode: Literal["exact", "sparse", "auto"] = field(
        default="exact", metadata={"help": "How this library's head is differentiated; docs/sparse.md."}
    )
    eps: float | None = field(default=None, metadata={"help": "ε of sparse gradients."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preference_settings(self.beta, self.alpha, 0.0)
        check_discount(self.gamma)
        check_kappa(self.kappa)
        if self.value_from == "logprobs" and self.kappa == 1.0:
            raise ValueError(
                "value_from='logprobs' is 0 everywhere at kappa=1: set kappa to another value, such as 0.7"
            )
        if (self.grad_mode, self.eps) != ("exact", None) and self.fused_head == "trl":
            raise ValueError("grad_mode and eps are of this library's head: set fused_head='tvkd', or leave them out")


ANOTHER_TOKENIZER = "give teacher_model the folder that `tvkd score` writes with it, which reads any teacher's tokens"


class TVKDTrainer(DPOTrainer):
    """DPOTrainer with a teacher: all of its arguments, and `teacher_model`.

    Args:
        model, ref_model, args, …: as DPOTrainer takes them; `args` is a TVKDConfig.
        teacher_model: a model that was trained by DPO, in the policy's tokens: its name or folder, or a module. Or what
            it said of the data before, whatever its tokens: a folder that `tvkd score` wrote, or a list of them, one
            for each dataset. Without it the run is DPO's own.
        teacher_reference: for `value_from="implicit_reward"`, what the teacher was before DPO; likewise.

    `rewards/*` stay unshaped, so that they compare with DPO's; `tvkd/shaping_margins` is the mean of α(Ψ_w − Ψ_l), and
    `tvkd/flipped` the share of pairs whose margin it turns over. With this library's head `entropy`, `logits/*` and
    `mean_token_accuracy` are left out: they are of whole rows of the vocabulary.

    Raises:
        ValueError: what TRL can do and this cannot, by name: losses of more than the margin, other divergences,
            `ld_alpha`, images, a teacher with another tokenizer; and with this library's head WPO's weighting, router
            losses, DeepSpeed and FSDP.
    """

    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    ref_model: Any
    precompute_ref_logps: bool
    _precompute_model_hash: str
    _tag_names: ClassVar = ["trl", "dpo", "tvkd"]
    _name = "TVKD"
    _paper: ClassVar = {
        "title": "Preference Distillation via Value based Reinforcement Learning",
        "id": "2509.16965",
        "citation": "@inproceedings{kwon2025preference,\n"
        "    title     = {{Preference Distillation via Value based Reinforcement Learning}},\n"
        "    author    = {Minchan Kwon and Junwon Ko and Kangil Kim and Junmo Kim},\n"
        "    year      = 2025,\n"
        "    booktitle = {Advances in Neural Information Processing Systems 38},\n"
        "    url       = {https://arxiv.org/abs/2509.16965},\n}",
    }

    def __init__(
        self,
        model: Any,
        ref_model: PreTrainedModel | None = None,
        args: TVKDConfig | None = None,
        *,
        teacher_model: str | PathLike[str] | PreTrainedModel | Sequence[str | PathLike[str]] | None = None,
        teacher_reference: str | PathLike[str] | PreTrainedModel | None = None,
        **options: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = TVKDConfig(f"{name.split('/')[-1]}-TVKD")
        if not isinstance(args, TVKDConfig):
            raise ValueError(
                f"args is a {type(args).__name__}: TVKDTrainer takes a TVKDConfig, which has its fields: "
                "from tvkd_fast.integrations.trl import TVKDConfig"
            )
        self._shapes = teacher_model is not None and args.alpha != 0
        teacher, folders = _teacher_or_folders(teacher_model)
        self._cached = CachedReturns(folders, _settings(args)) if self._shapes and folders else None
        if self._shapes:
            _refuse(args, has_reference=teacher_reference is not None, cached=self._cached is not None)
        self._ours = args.fused_head == "tvkd" or (args.fused_head == "auto" and args.device.type == "cpu")
        self._stats = HeadStats() if self._ours and args.grad_mode != "exact" else None
        self._has_head = False
        self._teacher: TeacherReturns | None = None
        named = {"policy": model, "reference": ref_model}
        if self._shapes and self._cached is None:
            named |= {"teacher": teacher, "teacher's reference": teacher_reference}
        configs = {whose: _config(one, args) for whose, one in named.items()}
        self._positions = {whose: longest_sequence(config) for whose, config in configs.items() if config is not None}
        self._stop_ids = _stops(model, args)
        self._found_ends: ResponseEnds | None = None
        self._named_reference = False
        super().__init__(model, ref_model, args, **options)
        self._take_head()
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "no weight of the model requires a gradient, so that nothing would be learned: give one that does, or "
                "peft_config"
            )
        if not self._shapes:
            return
        if self._is_vision_dataset:
            raise ValueError(
                "a teacher's values of images are not computed here: train on text alone, or by DPOTrainer"
            )
        self.data_collator = WithReturns(self.data_collator, self._ends, args.truncation_mode)
        if self._cached is not None:
            if isinstance(self.train_dataset, IterableDataset):
                raise ValueError("scores are looked up by row, which an IterableDataset has none of: give a Dataset")
            self._precompute(args, from_module=False)
            return
        assert teacher is not None
        self._teacher = self._load_teacher(teacher, teacher_reference)
        if args.precompute_teacher and not isinstance(self.train_dataset, IterableDataset):
            self._precompute(args, from_module=not isinstance(teacher, str))

    def _take_head(self) -> None:
        """This library's head in policy and reference, once, before either is called."""
        if not self._ours or self._has_head:
            return
        args = self.args
        whose = "is not for this library's head: set fused_head='trl'"
        if self.use_weighting:
            raise ValueError(f"use_weighting {whose}")
        if self.aux_loss_enabled:
            raise ValueError(f"the loss of a mixture's router {whose}, or router_aux_loss_coef=0")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(f"DeepSpeed and FSDP {whose}, or train by `tvkd train --nproc N`")
        gradient = HeadGradient(grad_mode=args.grad_mode, eps=args.eps)
        _without_trls_head(self.model)
        patch_lm_head(self.model, gradient=gradient, stats=self._stats, output=_Output)
        if self.ref_model is not None:
            _without_trls_head(self.ref_model)
            # It is lent: tried once, and patched while it is asked.
            unpatch_lm_head(patch_lm_head(self.ref_model, output=_Output))
        self._has_head = True

    def _reference_asked(self) -> AbstractContextManager[None]:
        """This library's head in the reference, where there is one, while the block lasts."""
        return answering(self.ref_model, output=_Output) if self._ours and self.ref_model is not None else nullcontext()

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        # What is there for a teacher is none of the model's inputs.
        with self._reference_asked():
            return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in RESPONSES})

    def _load_teacher(
        self, teacher: str | PreTrainedModel, reference: str | PathLike[str] | PreTrainedModel | None
    ) -> TeacherReturns:
        lent, before = self._loaded(teacher), None if reference is None else self._loaded(reference)
        ours = {id(module) for module in self.model.modules()}
        # Adapters of the policy's own base are the policy's.
        based = [
            model
            for model in (lent, before)
            if model is not None and any(id(layer) in ours for layer in adapter_layers(model))
        ]
        return TeacherReturns(lent, before, _settings(self.args), without_adapters=based)

    def _loaded(self, model: str | PathLike[str] | PreTrainedModel) -> PreTrainedModel:
        if isinstance(model, str | PathLike):
            model = fspath(model)
            theirs = load_tokenizer(model, trust_remote_code=self.args.trust_remote_code)
            _check_tokens(self._tokenizer, theirs, model)
            model = load_model(model, dtype=self.model.dtype, trust_remote_code=self.args.trust_remote_code)
        trained = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        trained -= {id(parameter) for parameter in adapter_parameters(model)}
        if model is self.model or not trained.isdisjoint(map(id, model.parameters())):
            raise ValueError("the teacher is, or shares weights with, the model that is trained: give one of its own")
        if model.config.get_text_config().vocab_size < len(self._tokenizer):
            raise ValueError(
                f"the teacher has {model.config.get_text_config().vocab_size:,} tokens and the policy's tokenizer "
                f"{len(self._tokenizer):,}: {ANOTHER_TOKENIZER}"
            )
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            # accelerate's hooks (device_map) have placed its weights, and bring its inputs to them.
            return model
        return model.to(self.accelerator.device)

    def _precompute(self, args: TVKDConfig, *, from_module: bool) -> None:
        """Two numbers a pair, of all data that there is; a teacher that was loaded for it is let go."""
        self.data_collator.maker = self._maker()
        sizes = args.per_device_train_batch_size, args.per_device_eval_batch_size
        self.train_dataset = self._with_returns(self.train_dataset, "train", sizes[0])
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._with_returns(dataset, name, sizes[1]) for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_returns(self.eval_dataset, "eval", sizes[1])
        if not from_module:
            self._teacher = None

    def _maker(self) -> Maker:
        """Whoever makes Ψ here, by all that decides it but the row's own tokens."""
        source = self._teacher if self._cached is None else self._cached
        assert source is not None
        args = self.args
        how = (self._ends.settings, args.max_length, args.truncation_mode, self._precision())
        return Maker(Hasher.hash((source.made_of, how)))

    def _precision(self) -> str:
        """Of the products, over weights whose dtype their fingerprints hold."""
        return str(self.accelerator.mixed_precision)

    def _with_returns(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The dataset with columns Ψ; from datasets' cache where this teacher has read it before.

        Columns that it has already stay if this trainer would make the same, and are made anew if not.
        """
        maker = self.data_collator.maker
        if isinstance(dataset, IterableDataset) or maker.made_all(dataset):
            return dataset
        dataset = without_returns(dataset)
        if self._cached is not None:
            rows = dataset.select_columns([name for name in (*IDS, ROW) if name in dataset.column_names])
            returns = self._cached.of(as_pairs(rows, self._ends, self.args.max_length))
            return concatenate_datasets([dataset, Dataset.from_dict(maker.columns(dataset, returns))], axis=1)
        told = [Hasher.hash((dataset._fingerprint, maker.key))]
        broadcast_object_list(told, from_process=0)
        file = dataset._get_cache_file_path(told[0])
        if not os.path.exists(file):
            returns = self._returns_of(dataset, name, batch_size)
            if self.accelerator.is_main_process:
                columns = maker.columns(dataset, returns)
                dataset.map(
                    lambda batch, indices: {key: [x[i] for i in indices] for key, x in columns.items()},
                    with_indices=True,
                    batched=True,
                    remove_columns=dataset.column_names,
                    new_fingerprint=told[0],
                    cache_file_name=file,
                )
            self.accelerator.wait_for_everyone()
        return concatenate_datasets([dataset, Dataset.from_file(file)], axis=1)

    def _returns_of(self, dataset: Dataset, name: str, batch_size: int) -> tuple[Tensor, Tensor]:
        assert self._teacher is not None
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator))
        found: list[Tensor] = []
        for batch in tqdm(loader, desc=f"Teacher over {name} dataset", disable=self.args.disable_tqdm):
            chosen, rejected = self._asked(batch)
            found.append(torch.stack(self.accelerator.gather_for_metrics((chosen, rejected))).cpu())
        chosen, rejected = torch.cat(found, 1)
        return chosen, rejected

    def _asked(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(P,) Ψ of chosen and of rejected responses, from the teacher itself."""
        if self._teacher is None:
            raise ValueError(
                "the teacher was let go once it had read the data: give this dataset as eval_dataset at the start, "
                "pass teacher_model as a module, or set precompute_teacher=False"
            )
        with self.accelerator.autocast():
            response, ended = (batch[name] for name in RESPONSES)
            returns = self._teacher.of(batch["input_ids"], response, ended, batch.get("attention_mask"))
        chosen, rejected = returns.chunk(2)
        return chosen, rejected

    @property
    def _ends(self) -> ResponseEnds:
        """Where responses end in the policy's tokens."""
        if self._found_ends is None:
            self._found_ends = ResponseEnds(self._tokenizer, self._stop_ids)
        return self._found_ends

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """The rows in the tokens that `tvkd score` reads. Raises ValueError for one that a model cannot."""
        options = {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {dataset_name} dataset"}
        with global_then_local_main_first():
            rows = read_rows(dataset, RowReader(self._tokenizer, self._stop_ids, dataset.features), **options)
            if args.max_length is not None and args.truncation_mode == "keep_start":
                rows = long_prompts_dropped(rows, args.max_length, num_proc=args.dataset_num_proc)
        for whose, positions in self._positions.items():
            rows = checked_rows(rows, positions, whose, args.max_length)
        return rows

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._take_head()
        held = self.ref_model
        # TRL asks whether there is one by its truth, and torch.compile's wrapper has none: it is a container's length.
        self.ref_model = getattr(held, "_orig_mod", held)
        try:
            self._name_reference()
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self.ref_model = held

    def _name_reference(self) -> None:
        """TRL names its cache by the data and the reference's weights; how both are used decides the numbers too."""
        if self._named_reference:
            return
        args = self.args
        reference = model_inside(self.model if self.ref_model is None else self.ref_model)
        how = (fingerprint_settings(reference), args.max_length, args.truncation_mode, self._precision())
        self._precompute_model_hash = Hasher.hash((self._precompute_model_hash, how))
        self._named_reference = True

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in (*RETURNS, MARK, ROW) if name not in self._signature_columns]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        with self._reference_asked():
            if not self._shapes:
                found = super()._compute_loss(model, inputs, return_outputs)
            else:
                found = self._shaped(_Heard(model), dict(inputs), return_outputs, self._metrics[mode])
        if self._ours:
            for name in ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"):
                self._metrics[mode].pop(name, None)
        if self._stats is not None and mode == "train" and self.accelerator.sync_gradients:
            for name, number in self._stats.read().items():
                self._metrics[mode][f"tvkd/{name}"].append(number)
            self._stats.reset()
        return found

    def _shaped(self, model: _Heard, inputs: dict[str, Any], return_outputs: bool, metrics: Any) -> Any:
        """TRL's loss over shifted reference log-probabilities; its reward metrics over those that were not shifted."""
        columns = [inputs.pop(name, None) for name in RETURNS]
        psi = torch.stack(columns if columns[0] is not None else list(self._asked(inputs)))
        inputs = {name: x for name, x in inputs.items() if name not in RESPONSES}
        if self.precompute_ref_logps:
            ref = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            reference = self.model if self.ref_model is None else self.ref_model
            ref = torch.stack(self.compute_ref_log_probs(reference, inputs))
        shaping = self.args.alpha * psi.to(ref)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref + shaping / self.beta
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            found = super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = before
        rewards = self.beta * (torch.stack(model.logps.detach().chunk(2)) - ref)
        margins, shifts = rewards[0] - rewards[1], shaping[0] - shaping[1]
        told = torch.stack(
            [*rewards, (margins > 0).float(), margins, shifts, (margins * (margins - shifts) < 0).float()]
        )
        means = self.accelerator.gather(told.T.contiguous()).mean(0).tolist()
        for name, mean in zip(("chosen", "rejected", "accuracies", "margins"), means[:4], strict=True):
            metrics[f"rewards/{name}"][-1] = mean
        for name, mean in zip(("shaping_margins", "flipped"), means[4:], strict=True):
            metrics[f"tvkd/{name}"].append(mean)
        return found


@dataclass
class _Output(FusedLMOutput):
    """Stands where TRL looks for more than log-probabilities; what is made of it is left out of the metrics."""

    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    aux_loss: Tensor | None = None

    def __post_init__(self) -> None:
        if self.log_probs is not None and self.label_mask is not None:
            self.entropy = self.mean_logits = torch.zeros_like(self.log_probs)
            self.is_top1 = torch.zeros_like(self.label_mask)
        super().__post_init__()


class _Heard:
    """A model that is called, and the sums of the log-probabilities that it answered with."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.logps: Tensor

    def __call__(self, **inputs: Any) -> Any:
        out = self._model(**inputs)
        if inputs.get("fused_lm_head"):
            # Prompt tuning puts virtual tokens before the real ones; they have no labels.
            self.logps = out.log_probs.sum(1)
        return out


def _teacher_or_folders(teacher: object) -> tuple[str | PreTrainedModel | None, list[str]]:
    """A model, its name, or folders of scores, whichever it is."""
    if teacher is None or isinstance(teacher, PreTrainedModel):
        return teacher, []
    if isinstance(teacher, torch.nn.Module):
        raise ValueError(
            f"teacher_model is a {type(teacher).__name__}, which is no transformers model: of a PEFT model give what "
            "its merge_and_unload() returns"
        )
    named = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    names = [fspath(name) for name in named if isinstance(name, str | PathLike)]
    if not named or len(names) < len(named):
        kinds = ", ".join(type(name).__name__ for name in named) or "an empty list"
        raise ValueError(
            f"teacher_model is or holds {kinds}: give a model, its name, a folder that `tvkd score` wrote, or a list "
            "of such folders"
        )
    found = [name for name in names if is_score_folder(name)]
    if isinstance(teacher, list | tuple) and len(found) < len(names):
        odd = next(name for name in names if name not in found)
        raise ValueError(
            f"{odd} is no folder that `tvkd score` wrote: a list is of such folders, and a model is given by itself"
        )
    return (None, found) if found else (names[0], [])


def _config(model: Any, args: TVKDConfig) -> Any:
    """A model's config, None where there is no model or none of this name: whoever loads it says so."""
    if not isinstance(model, str | PathLike):
        return getattr(model, "config", None)
    try:
        return read_config(fspath(model), trust_remote_code=args.trust_remote_code)
    except ValueError:
        return None


def _stops(model: Any, args: TVKDConfig) -> frozenset[int]:
    if not isinstance(model, str | PathLike):
        return stop_ids_of(model)
    try:
        return load_stop_ids(fspath(model), trust_remote_code=args.trust_remote_code)
    except ValueError:
        return frozenset()


def _without_trls_head(model: torch.nn.Module) -> None:
    """Take off the forward that TRL put over the model's, a closure that copies of the model would share."""
    carried = vars(model_inside(model))
    for name in ("forward", "_original_forward"):
        function = getattr(carried.get(name), "__func__", None)
        if isinstance(function, FunctionType) and function.__globals__["__name__"].startswith("trl."):
            carried[name] = getclosurevars(function).nonlocals["original_forward"]


def _settings(args: TVKDConfig) -> ShapingSettings:
    return ShapingSettings(
        gamma=args.gamma,
        kappa=args.kappa,
        value_scale=args.beta if args.value_scale is None else args.value_scale,
        value_from=args.value_from,
        terminal=args.terminal,
    )


def _refuse(args: TVKDConfig, *, has_reference: bool, cached: bool) -> None:
    """What is no function of the margin alone, which a shifted reference shifts; before a model is loaded."""
    if cached and has_reference:
        raise ValueError("scores were made with the teacher's reference or without it: leave out teacher_reference")
    if cached and not args.precompute_teacher:
        raise ValueError("scores are on disk, and no teacher is there to run on a batch: leave precompute_teacher True")
    if cached and args.truncation_mode != "keep_start":
        raise ValueError("scores are of responses cut at their ends: set truncation_mode='keep_start', TRL's default")
    if not cached and has_reference != (args.value_from == "implicit_reward"):
        raise ValueError(
            "value_from='implicit_reward' is what the teacher gained over the model that it was before DPO: give "
            "teacher_reference with it, and with it alone"
        )
    odd = [loss for loss in args.loss_type if loss not in OF_MARGINS]
    if odd:
        raise ValueError(
            f"loss_type {', '.join(odd)} sees more of a pair than its margin, and a teacher cannot shape that: take "
            f"{', '.join(OF_MARGINS)}, or no teacher_model"
        )
    if args.f_divergence_type != "reverse_kl":
        raise ValueError("a teacher shapes rewards of the reverse KL divergence: set f_divergence_type='reverse_kl'")
    if args.ld_alpha is not None:
        raise ValueError("ld_alpha weighs tokens, and Ψ is of whole responses: leave ld_alpha out, or teacher_model")


def _check_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, name: str) -> None:
    if ours.get_vocab() != theirs.get_vocab():
        raise ValueError(f"the teacher {name} has another tokenizer than the policy: {ANOTHER_TOKENIZER}")
