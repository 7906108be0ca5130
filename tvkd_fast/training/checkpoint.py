"""Checkpoints that are complete or invisible: safetensors and JSON, written beside their place and moved there.

A checkpoint is a folder `step-000100` with `model.safetensors`, `optimizer.safetensors` and `state.json`, whose
checksums of the other two make it whole. What is not whole is passed over, and the one before it is used.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tvkd_fast.data.folders import sha256_of

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what is left."""


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any], *, keep: int
) -> Path:
    """Write `folder/step-NNNNNN` with weights, optimizer, generators and `extra`, then drop all but the newest `keep`.

    Raises CheckpointError where the disk will not take it; earlier checkpoints are as they were.
    """
    target = folder / f"step-{step:06d}"
    partial = folder / f".{target.name}.partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".step-*.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()
        save_file(_parameters(model), partial / MODEL)
        save_file(_optimizer_tensors(model, optimizer), partial / OPTIMIZER)
        state = {
            "step": step,
            "rng": _rng_state(),
            "sha256": {name: sha256_of(partial / name) for name in (MODEL, OPTIMIZER)},
            **extra,
        }
        (partial / STATE).write_text(json.dumps(state, indent=2) + "\n")
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        left = newest_checkpoint(folder)
        raise CheckpointError(
            f"could not save step {step} to {folder}: {error}. Free some space (a checkpoint of this run takes "
            f"{_size(model) / 2**20:,.0f} MB) and run the same command again; "
            + (f"{left.name} is kept and will be resumed from" if left else "there is no earlier checkpoint")
        ) from error
    # A later folder is damaged, or this run would have gone on from it: it neither counts nor is it ours to drop.
    for old in [p for p in _checkpoints(folder) if _step(p) <= step][keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. One that is not whole is named in a warning and passed over."""
    for path in _checkpoints(folder):
        flaw = _flaw(path)
        if flaw is None:
            return path
        warnings.warn(f"{path} is not a whole checkpoint ({flaw}); looking at the one before it", stacklevel=2)
    return None


def set_aside(path: Path) -> None:
    """Move what an earlier run left out of the way of one that starts again; nothing is deleted."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.before-{number}")).exists():
        number += 1
    path.rename(aside)


def read_state(path: Path) -> dict[str, Any]:
    """What `state.json` holds: `step`, generators' states, and the caller's `extra`."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, optimizer state and generators back, bit for bit."""
    tensors = load_file(path / MODEL)
    parameters = dict(_parameters(model))
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())[:4]
        raise CheckpointError(
            f"{path} is of another model (parameters such as {', '.join(odd)}): give --output_dir a folder of its own"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(tensors[name].shape)}, this model's {tuple(parameter.shape)}: give "
                    "--output_dir a folder of its own"
                )
            parameter.copy_(tensors[name])
    _restore_optimizer(model, optimizer, load_file(path / OPTIMIZER))
    _restore_rng(read_state(path)["rng"])


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _flaw(path: Path) -> str | None:
    try:
        recorded = read_state(path)["sha256"]
        return next(
            (f"{n} does not match its checksum" for n in (MODEL, OPTIMIZER) if sha256_of(path / n) != recorded[n]), None
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, tensor in tensors.items():
        parameter_name, key = name.rsplit("/", 1)
        parameter = parameters[parameter_name]
        optimizer.state[parameter][key] = tensor.to(parameter.device)


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [s.numpy().tobytes().hex() for s in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
        "python": [version, list(internal), gauss],
    }


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes_tensor(s) for s in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _bytes_tensor(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(model: nn.Module) -> int:
    """Bytes of weights and AdamW's two moments."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters())
