"""Messages of the command line for an unknown option, or for a value that does not fit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

ELSEWHERE = {
    "policy": "model model_name model_name_or_path model_path base_model pretrained_model_name_or_path student",
    "reference": "ref ref_model ref_model_name_or_path model_ref reference_model reference_model_name_or_path",
    "teacher": "model policy teacher_model teacher_model_name_or_path teacher_name_or_path",
    "data.train": "data dataset dataset_name dataset_path datasets data_path train_data train_dataset train_file",
    "data.eval": (
        "data data_path dataset dataset_name dataset_path datasets eval_data eval_dataset eval_file test_file val_file "
        "validation_file"
    ),
    "data.subset": "dataset_config dataset_config_name config_name dataset_subset",
    "data.train_split": "dataset_train_split dataset_split split",
    "data.eval_split": "dataset_eval_split dataset_split dataset_test_split split",
    "data.train_limit": "max_train_samples max_samples num_train_samples",
    "data.eval_limit": "limit max_eval_samples max_samples num_eval_samples",
    "data.max_length": "cutoff_len max_len max_seq_len max_seq_length model_max_length seq_len seq_length sequence_len",
    "data.truncation": "truncation_mode truncation_side",
    "loss.beta": "dpo_beta kl_coef pref_beta",
    "loss.label_smoothing": "dpo_label_smoothing label_smoothing_factor",
    "objective": "loss loss_type pref_loss rl stage",
    "optim.lr": "learning_rate lr peak_lr",
    "optim.betas": "adam_beta1 adam_beta2",
    "optim.eps": "adam_eps adam_epsilon",
    "optim.clip_norm": "clip_grad clip_grad_norm grad_clip gradient_clipping max_grad_norm max_norm",
    "optim.final_lr_ratio": "min_lr min_lr_ratio min_lr_rate",
    "optim.warmup_steps": "lr_warmup_steps num_warmup_steps",
    "epochs": "n_epochs num_epochs num_train_epochs",
    "max_steps": "max_train_steps num_steps num_train_steps steps total_steps train_steps",
    "pairs_per_step": "batch_size effective_batch_size global_batch_size train_batch_size",
    "pairs_per_micro_batch": (
        "batch_size micro_batch_size per_device_batch_size per_device_eval_batch_size per_device_train_batch_size "
        "train_micro_batch_size_per_gpu per_gpu_train_batch_size eval_batch_size"
    ),
    "log_every": "log_steps logging_steps logging_strategy",
    "save_every": "save_freq save_interval save_steps save_strategy saving_steps",
    "eval_every": "eval_freq eval_interval eval_steps eval_strategy evaluation_strategy val_check_interval",
    "keep_checkpoints": "save_total_limit total_limit",
    "keep_best": "load_best_model_at_end metric_for_best_model",
    "resume": "overwrite_output_dir resume_from resume_from_checkpoint",
    "seed": "data_seed random_seed",
    "trackers": "log_with report_to use_wandb",
    "trackers [wandb]": "wandb",
    "trackers [trackio]": "trackio",
    "output_dir": "out out_dir output output_path save_dir save_path",
    "output": "out output_dir output_file output_path",
    "out": "output output_dir",
    "head.grad_mode": "sparse_gradients",
    "lora.rank": "lora_dim lora_r lora_rank use_lora use_peft",
    "lora.alpha": "lora_alpha",
    "lora.targets": "lora_target lora_target_linear lora_target_modules target_modules",
    "lora.quantize nf4": "load_in_4bit qlora quantization quantization_bit",
    "model.dtype": "model_dtype torch_dtype weights_dtype",
    "model.autocast bfloat16": "bf16 mixed_precision",
    "model.packing": "pack padding_free sample_packing",
    "model.activation_checkpointing full": (
        "activation_checkpointing disable_gradient_checkpointing enable_gradient_checkpointing gradient_checkpointing"
    ),
    "model.attn_implementation flash_attention_2": "flash_attention flash_attn use_flash_attention_2",
    "model.device cpu": "cpu no_cuda use_cpu",
    "model.device cuda": "cuda gpu use_gpu",
    "model.attn_implementation": "attention attention_implementation attn attn_impl",
    "model.threads": "num_threads",
    "nproc": (
        "ddp deepspeed fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap gpus n_gpus nproc_per_node num_gpus "
        "num_processes"
    ),
    "loss.value_from": "value_type",
    "n": "best_of num_generations num_return_sequences num_samples",
    "max_new_tokens": "max_completion_length max_tokens",
    "compare": "models",
}
"""Other trainers' names of an option, by option, with a value where only that means the same. The first option that a
command has is named, so that `model` is the policy of one that has a policy, and the teacher of `tvkd explain`."""

REMEDIES = {
    "accumulation follows from --pairs_per_step, the pairs of a step, and --tokens_per_micro_batch": (
        "accumulate_grad_batches grad_accum gradient_accumulation gradient_accumulation_steps"
    ),
    "there is no float16 here: --model.autocast bfloat16 computes products in bfloat16": "fp16 half",
    "prompts have no limit of their own: --data.max_length counts prompt and response, and --data.truncation says what "
    "is cut": "max_completion_length max_prompt_length max_prompt_len max_target_length max_response_length",
    "the rate rises for --optim.warmup_steps steps and falls along a cosine to --optim.final_lr_ratio of its peak": (
        "lr_scheduler lr_scheduler_kwargs lr_scheduler_type lr_schedule scheduler warmup_ratio warmup"
    ),
    "it is AdamW: --optim.lr, --optim.betas, --optim.eps and --optim.weight_decay": "optimizer optimizer_type optim",
    "adapters have no dropout: the noise of two masks would be in the log-ratio": "lora_dropout dropout",
    "weights are packed in four bits alone: --lora.quantize nf4": "load_in_8bit",
    "there is no likelihood beside the preference loss": "nll_coef pref_ftx rpo_alpha sft_coef sft_weight",
    "nothing is uploaded: `hf upload NAME OUTPUT_DIR/final`": "hub_model_id hub_token push_to_hub",
    "a run is named by its --output_dir": "experiment_name name run_name wandb_name",
    "the policy's own tokenizer makes the tokens: save the one that you want in its folder": (
        "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path processing_class"
    ),
    "`tvkd score` keeps the numbers of reference and teacher: --scores FOLDER reads it": (
        "precompute_ref_log_probs precompute_reference precompute_teacher"
    ),
    "tokens are made before the first step, and need no workers": (
        "dataloader_num_workers dataset_num_proc num_proc num_workers preprocessing_num_workers workers"
    ),
    "processes are started by --nproc N, or by torchrun": "local_rank world_size master_port",
    "`tvkd train` trains, and `tvkd eval` evaluates": "do_eval do_predict do_train",
    "conversations are written with the tokenizer's own template, which --data.chat_template never leaves out": (
        "chat_template chat_template_path template"
    ),
}
"""Options of other trainers that do not exist here, by what exists instead."""

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def hint(word: str, known: Sequence[str]) -> str:
    """Suggest what to type instead of an unknown option: " Did you mean --x?", a plain sentence, or nothing.

    Names of the same meaning come first, then an option of that name in a group, then one that is spelt alike.
    """
    word = word.replace("-", "_")
    leaf = word.rpartition(".")[2]
    for names in (word, leaf):
        for option, theirs in ELSEWHERE.items():
            if names in theirs.split() and option.split()[0] in known:
                return f" Did you mean --{option}?"
        for sentence, theirs in REMEDIES.items():
            if names in theirs.split() and all(x in known for x in re.findall(r"--([\w.]*\w)", sentence)):
                return f" {sentence[0].upper()}{sentence[1:]}."
    same = [option for option in known if _letters(option) == _letters(word)] or [
        option for option in known if option.rpartition(".")[2] == leaf
    ]
    if same:
        return f" Did you mean {' or '.join(f'--{option}' for option in same)}?"
    # Of options that are as like, the one outside the groups: --seed, and not --head.seed.
    alike = max(known, key=lambda option: (_likeness(word, option), -option.count(".")), default="")
    is_group = any(option.startswith(f"{alike}.") for option in known)
    return f" Did you mean --{alike}?" if _likeness(word, alike) >= (0.85 if is_group else 0.8) else ""


def _letters(name: str) -> str:
    """Return a name without the characters that separate its words, which are the most often mistyped."""
    return re.sub(r"[._]", "", name).lower()


def _likeness(word: str, option: str) -> float:
    names = (option, option.rpartition(".")[2])
    return max(difflib.SequenceMatcher(None, word.lower(), name).ratio() for name in names)


def in_options(message: str, config: type | None, known: Sequence[str]) -> str:
    """Rewrite the parser's message in one line, with options as they are typed and what a value should be.

    `config` is the command's, whose types and defaults show what a value looks like.
    """
    missing = re.fullmatch(r"the following arguments are required: (.*)", message)
    if missing:
        names = (name.strip().partition(".")[2] or name.strip() for name in missing[1].split(","))
        model = ", or --model" if missing[1] == "eval.policy" else ""
        return f"required, and not given: {', '.join(f'--{name}' for name in names)}{model}"
    bare = re.fullmatch(r"argument (--\S+): expected one argument", message)
    if bare:
        return f"{bare[1]} wants a value, and was given none"
    wrong = re.match(r'Parser key "([^"]+)":', message)
    if wrong is None:
        return message
    name = wrong[1]
    if "Unable to load config" in message:
        options = [option for option in known if option.startswith(f"{name}.")]
        return f"--{name} is no option but a group of them: {', '.join(f'--{option}' for option in options)}."
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    wants = _wants(message, name, "" if given is None else given[1], config)
    return message if given is None or not wants else f"--{name} wants {wants}, and got {given[1]!r}"


def _wants(message: str, name: str, given: str, config: type | None) -> str:
    """Describe what a value of the option should be; empty where the message gives no type."""
    choice = re.search(r"Literal\[([^\]]*)\]", message)
    kinds = [kind for kind in dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", message)) if kind != "NoneType"]
    inside = [part for part in re.split(r"[\s,;]+", given.strip("()[]{} ")) if part]
    listed = f"[{','.join(part.strip(chr(39) + chr(34)) for part in inside) or 'a,b'}]"
    if "tuple" in kinds or "Expected a tuple" in message:
        default = _default(config, name)
        if isinstance(default, tuple):
            numbers = listed if len(inside) == len(default) else f"[{','.join(map(str, default))}]"
            return f"{len(default)} values in brackets, such as {numbers}"
        return "values in brackets"
    if "list" in kinds:
        choices = [x for of in get_args(_hint(config, name)) for x in get_args(of) if isinstance(x, str)]
        return f"a list of {', '.join(choices)}, such as [{choices[0]}]" if choices else f"a list, such as {listed}"
    if choice:
        return f"one of {choice[1]}"
    return " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)


def _owner(config: Any, name: str) -> tuple[Any, str]:
    """Return the config that has the option of this dotted name as a field, and the field's name."""
    group, _, leaf = name.rpartition(".")
    for part in group.split(".") if group else ():
        config = get_type_hints(config).get(part) if is_dataclass(config) else None
    return config, leaf


def _hint(config: Any, name: str) -> Any:
    owner, leaf = _owner(config, name)
    return get_type_hints(owner).get(leaf) if is_dataclass(owner) else None


def _default(config: Any, name: str) -> Any:
    owner, leaf = _owner(config, name)
    return next((field.default for field in fields(owner) if field.name == leaf), None) if is_dataclass(owner) else None
