"""TRL's DPOTrainer with a teacher: `TVKDTrainer` and `TVKDConfig` in place of `DPOTrainer` and `DPOConfig`.

Ψ does not depend on the policy, so log π_ref + (α/β)Ψ in place of log π_ref turns a loss of DPO's margin into TVKD's:
β[(log π_w − log π_ref,w − (α/β)Ψ_w) − (… l …)] = β[ρ_w − ρ_l] − α[Ψ_w − Ψ_l]. TRL's own code computes it, unmodified.

Letters: P pairs of a batch (2P rows, chosen first), L row length.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from os import PathLike, fspath
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import global_then_local_main_first

from tvkd_fast._compat import inside_compiled
from tvkd_fast.data.response_end import ResponseEnds
from tvkd_fast.integrations.patched import model_inside
from tvkd_fast.integrations.returns import IDS, MARK, RETURNS, Maker, without_returns
from tvkd_fast.integrations.rows import (
    DATA_REWARDS,
    OF_OBJECTIVES,
    RESPONSES,
    ROW,
    RowReader,
    WithReturns,
    as_pairs,
    checked_rows,
    long_prompts_dropped,
    read_rows,
)
from tvkd_fast.integrations.scores import CachedReturns
from tvkd_fast.integrations.teacher import TeacherReturns
from tvkd_fast.integrations.trl_config import TVKDConfig, check_shaping, shaping_settings
from tvkd_fast.integrations.trl_head import TrainerHeads
from tvkd_fast.integrations.trl_models import (
    ANOTHER_TOKENIZER,
    check_tokens,
    config_of,
    lent_model,
    stops_of,
    teacher_or_folders,
)
from tvkd_fast.integrations.trl_objective import check_given, objective_of
from tvkd_fast.integrations.trl_step import TrainerStep
from tvkd_fast.models import fingerprint_settings, load_model, load_tokenizer, longest_sequence
from tvkd_fast.models.lent import moves_with, on_base_of, undone
from tvkd_fast.objectives import Need, Objective

__all__ = ["TVKDConfig", "TVKDTrainer"]


class TVKDTrainer(TrainerStep):
    """DPOTrainer with a teacher, or another objective: all of its arguments, and `teacher_model` and `objective`.

    Args:
        model, ref_model, args, …: as DPOTrainer takes them; `args` is a TVKDConfig.
        teacher_model: a model that was trained by DPO, in the policy's tokens: its name or folder, or a module. Or what
            it computed for the data before, whatever its tokens: a folder that `tvkd score` wrote, or a list of them,
            one for each dataset. Without it the run is DPO's own.
        teacher_reference: for `value_from="implicit_reward"`, what the teacher was before DPO; likewise.
        objective: a loss of this library in place of TRL's, by its name or with its settings, such as
            `SimPO(beta=2.5)`; `teacher_model` is then what the objective reads of a teacher.

    `rewards/*` stay unshaped, so that they compare with DPO's; `tvkd/shaping_margins` is the mean of α(Ψ_w − Ψ_l), and
    `tvkd/flipped` the share of pairs whose margin it turns over. With this library's head `entropy`, `logits/*` and
    `mean_token_accuracy` are left out: they are of whole rows of the vocabulary.

    Raises:
        ValueError: what TRL can do and this cannot, by name: losses of more than the margin, other divergences,
            `ld_alpha`, images, a teacher with another tokenizer, a teacher or reference that training would change; and
            with this library's head TRL's `use_weighting`, DeepSpeed and FSDP; an objective whose numbers are not
            computed here. The models are then as they were.
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
        objective: str | Objective | None = None,
        **options: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.name_or_path
            args = TVKDConfig(f"{name.split('/')[-1]}-TVKD")
        if not isinstance(args, TVKDConfig):
            raise ValueError(
                f"args is a {type(args).__name__}: TVKDTrainer takes a TVKDConfig, which has its fields: "
                "from tvkd_fast.integrations.trl import TVKDConfig"
            )
        self._objective: Objective | None = None
        if objective is not None:
            self._objective, args = objective_of(objective, args)
        with ExitStack() as stack:
            for given in (model, ref_model, teacher_model, teacher_reference):
                if isinstance(given, nn.Module):
                    stack.enter_context(undone(given, on_error=True))
            self._build(model, ref_model, args, teacher_model, teacher_reference, **options)

    def _build(
        self,
        model: Any,
        ref_model: PreTrainedModel | None,
        args: TVKDConfig,
        teacher_model: Any,
        teacher_reference: str | PathLike[str] | PreTrainedModel | None,
        **options: Any,
    ) -> None:
        objective = self._objective
        if objective is not None:
            check_given(objective, args, has_teacher=teacher_model is not None, has_reference=ref_model is not None)
        self._asks_teacher = teacher_model is not None and args.alpha != 0
        teacher, folders = teacher_or_folders(teacher_model)
        teacher_reference = lent_model(teacher_reference, "teacher_reference")
        self._shaping = shaping_settings(args) if objective is None else None
        self._cached = CachedReturns(folders, self._shaping) if self._asks_teacher and folders else None
        if self._asks_teacher:
            check_shaping(args, has_reference=teacher_reference is not None, cached=self._cached is not None)
        self._heads = TrainerHeads(args)
        self._teacher: TeacherReturns | None = None
        named = {"policy": model, "reference": ref_model}
        if self._asks_teacher and self._cached is None:
            named |= {"teacher": teacher, "teacher's reference": teacher_reference}
        configs = {whose: config_of(one, args) for whose, one in named.items()}
        self._positions = {whose: longest_sequence(config) for whose, config in configs.items() if config is not None}
        self._stop_ids = stops_of(model, args)
        self._found_ends: ResponseEnds | None = None
        self._named_reference = False
        super().__init__(model, ref_model, args, **options)
        self._heads.take(self)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "no weight of the model requires a gradient, so that nothing would be learned: give one that does, or "
                "peft_config"
            )
        if objective is not None and Need.REFERENCE not in objective.needs:
            self.ref_model = None
        if not self._asks_teacher and objective is None:
            return
        if self._is_vision_dataset:
            raise ValueError(
                "a teacher's values of images are not computed here: train on text alone, or by DPOTrainer"
            )
        self.data_collator = WithReturns(
            self.data_collator, self._ends, args.truncation_mode, for_objective=objective is not None
        )
        if not self._asks_teacher:
            return
        if self._cached is not None:
            if isinstance(self.train_dataset, IterableDataset):
                raise ValueError("scores are looked up by row, which an IterableDataset has none of: give a Dataset")
            self._precompute(args, from_module=False)
            return
        assert teacher is not None
        self._teacher = self._load_teacher(teacher, teacher_reference)
        if args.precompute_teacher and not isinstance(self.train_dataset, IterableDataset):
            self._precompute(args, from_module=not isinstance(teacher, str))

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        self._heads.take(self)
        # Columns for a teacher are no inputs of the model.
        with self._heads.asked(self.ref_model, self.model):
            return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in OF_OBJECTIVES})

    def _load_teacher(
        self, teacher: str | PreTrainedModel, reference: str | PathLike[str] | PreTrainedModel | None
    ) -> TeacherReturns:
        lent, before = self._loaded(teacher), None if reference is None else self._loaded(reference)
        # Adapters of the policy's own base are the policy's.
        based = [model for model in (lent, before) if model is not None and on_base_of(model, self.model)]
        return TeacherReturns(lent, before, self._shaping, without_adapters=based)

    def _loaded(self, model: str | PathLike[str] | PreTrainedModel) -> PreTrainedModel:
        if isinstance(model, str | PathLike):
            model = fspath(model)
            theirs = load_tokenizer(model, trust_remote_code=self.args.trust_remote_code)
            check_tokens(self._tokenizer, theirs, model)
            model = load_model(model, dtype=self.model.dtype, trust_remote_code=self.args.trust_remote_code)
        if model is self.model or moves_with(model, self.model):
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
        """Compute Ψ of all data, two numbers per pair, and release a teacher that was loaded for it."""
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
        """The source of this trainer's Ψ, identified by all that determines it but the row's tokens."""
        source = self._teacher if self._cached is None else self._cached
        assert source is not None
        args = self.args
        how = (self._ends.settings, args.max_length, args.truncation_mode, self._precision())
        return Maker(Hasher.hash((source.made_of, how)))

    def _precision(self) -> str:
        """The autocast precision; the weights' own dtypes are in their fingerprints."""
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
        fingerprint = [Hasher.hash((dataset._fingerprint, maker.key))]
        broadcast_object_list(fingerprint, from_process=0)
        file = dataset._get_cache_file_path(fingerprint[0])
        if not os.path.exists(file):
            returns = self._returns_of(dataset, name, batch_size)
            if self.accelerator.is_main_process:
                columns = maker.columns(dataset, returns)
                dataset.map(
                    lambda batch, indices: {key: [x[i] for i in indices] for key, x in columns.items()},
                    with_indices=True,
                    batched=True,
                    remove_columns=dataset.column_names,
                    new_fingerprint=fingerprint[0],
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
        """Return the ends of responses in the policy's tokens."""
        if self._found_ends is None:
            self._found_ends = ResponseEnds(self._tokenizer, self._stop_ids)
        return self._found_ends

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """The rows in the tokens that `tvkd score` reads. Raises ValueError for one that a model cannot."""
        options = {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {dataset_name} dataset"}
        with global_then_local_main_first():
            rewards = self._objective is not None and Need.REWARDS in self._objective.needs
            reader = RowReader(self._tokenizer, self._stop_ids, dataset.features, rewards, args.rewards)
            rows = read_rows(dataset, reader, **options)
            if args.max_length is not None and args.truncation_mode == "keep_start":
                rows = long_prompts_dropped(rows, args.max_length, num_proc=args.dataset_num_proc)
        for whose, positions in self._positions.items():
            rows = checked_rows(rows, positions, whose, args.max_length)
        return rows

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._heads.take(self)
        held = self.ref_model
        # TRL takes its truth value: that of torch.compile's wrapper would be a container's length, which it lacks.
        self.ref_model = inside_compiled(held)
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
        read = (*RETURNS, MARK, ROW, DATA_REWARDS)
        self._signature_columns += [name for name in read if name not in self._signature_columns]
