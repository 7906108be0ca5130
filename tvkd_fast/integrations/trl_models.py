"""The models that `TVKDTrainer` is given, and what each argument may be."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike, fspath
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tvkd_fast.integrations.patched import unwrapped
from tvkd_fast.integrations.scores import is_score_folder
from tvkd_fast.integrations.trl_config import TVKDConfig
from tvkd_fast.models import load_stop_ids, read_config, stop_ids_of

ANOTHER_TOKENIZER = "give teacher_model the folder that `tvkd score` writes with it, which reads any teacher's tokens"


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
    """The model's config, and None where it has none."""
    return _read(model, args, lambda module: getattr(module, "config", None), read_config, None)


def stops_of(model: Any, args: TVKDConfig) -> frozenset[int]:
    return _read(model, args, stop_ids_of, load_stop_ids, frozenset())


def _read(
    model: Any, args: TVKDConfig, of_module: Callable[[Any], Any], of_name: Callable[..., Any], otherwise: Any
) -> Any:
    """Reads something of a module, or by a name; `otherwise` where none has this name, which loading it reports."""
    if not isinstance(model, str | PathLike):
        return of_module(model)
    try:
        return of_name(fspath(model), trust_remote_code=args.trust_remote_code)
    except ValueError:
        return otherwise


def check_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, name: str) -> None:
    if ours.get_vocab() != theirs.get_vocab():
        raise ValueError(f"the teacher {name} has another tokenizer than the policy: {ANOTHER_TOKENIZER}")
