"""Adapters that peft saved: where their base is, and both as one model.

A folder with an `adapter_config.json` names base and adapter together, as for transformers. The adapter is merged for
good as it is loaded, so that such a model is trained, sharded, pruned, fingerprinted and saved as any other.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from tvkd_fast.models.tied import config_as_tied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which a folder with a tokenizer has one."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter by its folder or hub name."""

    name: str
    base: str
    """The model that it was trained beside; the folder itself where that model's weights are in it too."""
    revision: str | None
    """The base's revision on its hub."""
    kind: str
    """peft's word for it, such as LORA."""


def adapter_folder(name: str) -> AdapterFolder | None:
    """Return the adapter at `name`, or None for a whole model. Raises ValueError where its base is not named."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name)
    except OSError:
        # Loading it raises an error that explains the name.
        found = None
    if found is None:
        return None
    try:
        config: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{found} is damaged ({error}): save the adapter again") from error
    if (Path(name) / "config.json").is_file() and any(Path(name).glob("model*.safetensors")):
        return AdapterFolder(name, name, None, config.get("peft_type", "?"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"the adapter {name} does not say which model it belongs to: write its folder or hub name as "
            "base_model_name_or_path into adapter_config.json, or give a merged model"
        )
    _check_ends(Path(name), base)
    return AdapterFolder(name, base, config.get("revision"), config.get("peft_type", "?"))


def _check_ends(folder: Path, base: str) -> None:
    """Raise ValueError where the chain from an adapter to its base, itself an adapter, leads back to where it began."""
    seen = {folder.resolve()}
    while (config := Path(base) / "adapter_config.json").is_file() and not (Path(base) / "config.json").is_file():
        if Path(base).resolve() in seen:
            raise ValueError(
                f"the adapter {folder} has itself as its base: write the model that it was trained beside into "
                "adapter_config.json as base_model_name_or_path"
            )
        seen.add(Path(base).resolve())
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""


def has_tokenizer(name: str) -> bool:
    """Return whether a folder or hub repository has a tokenizer of its own."""
    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in _TOKENIZERS)
    return any(_cached(name, file) is not None for file in _TOKENIZERS[:2])


def merge_adapter(base: PreTrainedModel, adapter: AdapterFolder) -> PreTrainedModel:
    """The base with the adapter merged into its weights, in place. ValueError where that cannot be done whole."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ValueError(f"{adapter.name} is an adapter, which peft reads: pip install 'tvkd_fast[lora]'") from error
    if PeftConfig.from_pretrained(adapter.name).is_prompt_learning:
        raise ValueError(f"{adapter.name} ({adapter.kind}) learns tokens and no weights: give an adapter that merges")
    weights = _weights_of(adapter)
    resized = resize_for_adapter(base, adapter)
    try:
        with warnings.catch_warnings():
            # peft asks for a property by the name that transformers deprecates.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # peft only warns of weights that a file lacks.
            warnings.filterwarnings("error", "Found missing adapter keys")
            both = PeftModel.from_pretrained(base, adapter.name, torch_device=str(base.device))
        _check_taken(both, weights)
        _untie(both.get_base_model())
        merged: PreTrainedModel = both.merge_and_unload(safe_merge=True)
    except (RuntimeError, AttributeError, NotImplementedError, UserWarning, ValueError) as error:
        raise ValueError(
            f"the adapter {adapter.name} ({adapter.kind}) cannot be merged into {adapter.base}: "
            f"{' '.join(str(error).split())[:200]}. Give a merged model, or the base that it was trained beside"
        ) from error
    both_ends = (merged.get_input_embeddings(), merged.get_output_embeddings())
    if resized and not all(bool(x.weight.isfinite().all()) for x in both_ends):
        raise ValueError(
            f"the adapter {adapter.name} was trained beside {adapter.base} with a vocabulary of {resized:,} tokens, "
            "and holds no embedding or no head of the new ones: save it again with save_embedding_layers=True, or give "
            "a merged model"
        )
    config_as_tied(merged)
    merged.requires_grad_(True)
    # What is saved beside this model must not take its base for it.
    merged.name_or_path = merged.config.name_or_path = adapter.name
    return merged.eval()


@torch.no_grad()
def resize_for_adapter(model: PreTrainedModel, adapter: AdapterFolder) -> int | None:
    """Resize the base's vocabulary to that which the adapter was trained with, and return its size.

    Returns None where the adapter holds no embedding or head of another size. The new rows are NaN until the adapter's
    are loaded over them.
    """
    rows = _rows_of_vocabulary(model, _weights_of(adapter))
    before = model.get_input_embeddings().weight.shape[0]
    if rows is None or rows == before:
        return None
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[before:] = torch.nan
    return rows


def _rows_of_vocabulary(model: PreTrainedModel, weights: str) -> int | None:
    """Return the number of rows of the embedding or head that an adapter's file holds; None where it holds neither."""
    both_ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = "|".join(re.escape(name) for name, module in model.named_modules() if module in both_ends)
    with safe_open(weights, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if re.fullmatch(rf"base_model\.model\.({names})(\.base_layer|\.modules_to_save)?\.weight", key):
                return int(file.get_slice(key).get_shape()[0])
    return None


def _weights_of(adapter: AdapterFolder) -> str:
    weights = _cached(adapter.name, WEIGHTS)
    if weights is None:
        raise ValueError(f"{adapter.name} has no {WEIGHTS}: save the adapter again, as safetensors")
    return weights


def _check_taken(model: nn.Module, weights: str) -> None:
    """Raise ValueError where the file holds low-rank weights of layers that the model does not have: peft leaves them
    out."""
    with safe_open(weights, framework="pt") as file:
        saved = {name for name in file.keys() if re.search(r"\.lora_[AB]\.", name)}  # noqa: SIM118
    places = {re.sub(r"(\.lora_[AB])\.default\.", r"\1.", name) for name, _ in model.named_parameters()}
    # peft puts adapters of single experts together.
    odd = sorted(name for name in saved - places if ".experts." not in name)
    if odd:
        raise ValueError(f"it has weights of layers that do not exist, such as {odd[0]}")


def _untie(model: PreTrainedModel) -> None:
    """Give the head weights of its own where it or the embedding has an adapter: merged, it would be in both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = any(hasattr(layer, "base_layer") for layer in (embedding, head))
    if adapted and head.weight is embedding.weight:
        plain = getattr(head, "base_layer", head)
        plain.weight = nn.Parameter(plain.weight.detach().clone())


def _cached(name: str, file: str) -> str | None:
    """The path of a file in a folder or hub repository; None where it does not exist."""
    from transformers.utils import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    found: str | None = cached_file(name, file, **quiet)
    return found
