"""The models that `TVKDTrainer` is given: what each argument may be, and how TRL's code is made to ask them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import getclosurevars
from os import PathLike, fspath
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tvkd_fast.integrations.lm_head import FusedLMOutput
from tvkd_fast.integrations.patched import model_inside, unwrapped
from tvkd_fast.integrations.scores import is_score_folder
from tvkd_fast.integrations.trl_config import TVKDConfig
from tvkd_fast.models import load_stop_ids, read_config, stop_ids_of
from tvkd_fast.models.lent import moves_with, on_base_of

ANOTHER_TOKENIZER = "give teacher_model the folder that `tvkd score` writes with it, which reads any teacher's tokens"


@dataclass
class TRLOutput(FusedLMOutput):
    """An answer with zeros where TRL reads more than log-probabilities; its metrics of those are left out."""

    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None

    def __post_init__(self) -> None:
        if self.log_probs is not None and self.label_mask is not None:
            self.entropy = self.mean_logits = torch.zeros_like(self.log_probs)
            self.is_top1 = torch.zeros_like(self.label_mask)
        super().__post_init__()


class HeardModel:
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


@dataclass(frozen=True)
class AskedModel:
    """A model that is called within a context, in which nothing else is."""

    model: nn.Module
    context: Callable[[], AbstractContextManager[None]]

    def __call__(self, **inputs: Any) -> Any:
        with self.context():
            return self.model(**inputs)


def check_reference(reference: nn.Module, policy: nn.Module) -> None:
    """Raise ValueError for a reference that training the policy would change."""
    if moves_with(reference, policy):
        raise ValueError(
            "the reference is, or shares weights with, the model that is trained: leave ref_model out, or give one of "
            "its own"
        )
    if on_base_of(reference, policy) and hasattr(unwrapped(reference), "get_base_model"):
        raise ValueError(
            "ref_model is a PEFT model around the policy's own base, and its adapters cannot be told from the "
            "policy's: leave ref_model out for the policy as it starts, or give the base for it without adapters"
        )


def lent_model(model: object, argument: str) -> Any:
    """A transformers model out of what torch.compile and data parallelism put around it; what is no module as it is."""
    if not isinstance(model, nn.Module):
        return model
    found = unwrapped(model)
    if not isinstance(found, PreTrainedModel):
        raise ValueError(
            f"{argument} is a {type(found).__name__}, which is no transformers model: of a PEFT model give what its "
            "merge_and_unload() returns"
        )
    return found


def teacher_or_folders(teacher: object) -> tuple[str | PreTrainedModel | None, list[str]]:
    """The model or its name, or folders of scores, whichever it is."""
    teacher = lent_model(teacher, "teacher_model")
    if teacher is None or isinstance(teacher, PreTrainedModel):
        return teacher, []
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


def config_of(model: Any, args: TVKDConfig) -> Any:
    """A model's config, None where there is no model or none of this name: whoever loads it says so."""
    if not isinstance(model, str | PathLike):
        return getattr(model, "config", None)
    try:
        return read_config(fspath(model), trust_remote_code=args.trust_remote_code)
    except ValueError:
        return None


def stops_of(model: Any, args: TVKDConfig) -> frozenset[int]:
    if not isinstance(model, str | PathLike):
        return stop_ids_of(model)
    try:
        return load_stop_ids(fspath(model), trust_remote_code=args.trust_remote_code)
    except ValueError:
        return frozenset()


def without_trls_head(model: nn.Module) -> None:
    """Take off the forwards that TRL put over the model's, closures that copies of the model would share."""
    inside = model_inside(model)
    carried = vars(inside)
    for name in ("forward", "_original_forward"):
        while _is_trls(function := getattr(carried.get(name), "__func__", None)):
            carried[name] = getclosurevars(function).nonlocals["original_forward"]  # type: ignore[arg-type]
        if getattr(carried.get(name), "__func__", None) is type(inside).forward and name == "forward":
            del carried[name]


def _is_trls(function: Any) -> bool:
    return isinstance(function, FunctionType) and function.__globals__["__name__"].startswith("trl.")


def check_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, name: str) -> None:
    if ours.get_vocab() != theirs.get_vocab():
        raise ValueError(f"the teacher {name} has another tokenizer than the policy: {ANOTHER_TOKENIZER}")
