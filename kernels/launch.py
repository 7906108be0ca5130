"""Launching a kernel: the target of a tensor, operands as pointers or descriptors, and the launch itself."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tvkd_fast.kernels.configs import FP_FUSION, TileConfig
from tvkd_fast.kernels.releases import untried

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels; Triton decides it when they are imported, and so does this."""

_NVIDIA = {(8, 0): "sm_80", (8, 7): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90"}
_NVIDIA_MAJOR = {10: "sm_100", 12: "sm_86"}
_AMD = {"gfx942": "gfx942", "gfx950": "gfx942"}
_LEAST = (8, 0)
"""Before it no tensor core takes bfloat16."""
_KNOWN_MULTIPLE = 16
_log = logging.getLogger("tvkd_fast")


def refusal(device: torch.device) -> str | None:
    """Return why tensors of a device cannot go through compiled kernels, and the remedy; None where they can."""
    if device.type != "cuda":
        return (
            f"compiled kernels want CUDA or ROCm tensors, not {device.type}: move them, take impl='torch', or set "
            "TRITON_INTERPRET=1 before Python starts, for Triton's slow interpreter"
        )
    try:
        _device_target(torch.cuda.current_device() if device.index is None else device.index)
    except ValueError as error:
        return str(error)
    return None


def target_of(tensor: Tensor) -> str:
    """The target of the configuration table for a tensor's device; ValueError for a device that no kernel runs on."""
    if INTERPRETED:
        return "interpreter"
    if not tensor.is_cuda:
        raise ValueError(refusal(tensor.device))
    return _device_target(tensor.get_device())


@lru_cache
def _say_untried() -> None:
    if (said := untried()) is not None:
        _log.warning(said)


@lru_cache
def _device_target(device: int) -> str:
    _say_untried()
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        target = _AMD.get(name)
    else:
        capability = torch.cuda.get_device_capability(device)
        name = "sm_{}{}".format(*capability)
        target = _NVIDIA.get(capability, _NVIDIA_MAJOR.get(capability[0]))
        if target is None and capability >= _LEAST:
            # The tiles of least shared memory and without bulk copies, which every such device runs.
            target = "sm_86"
            _log.warning("no tiles are configured for %s: those of sm_86 serve, which are not its fastest", name)
    if target is None:
        raise ValueError(f"no kernel is configured for {name}: take impl='torch'")
    return target


def aligned(*tensors: Tensor) -> bool:
    """Return whether the compiler can assume that each row of each matrix begins and ends at a multiple of 16 bytes.

    Triton passes on which pointers, strides and sizes are multiples of 16, and no smaller multiple: with 40 columns of
    bfloat16, 80 bytes per row, the compiler would copy each number by itself and spill.
    """
    return all(n % _KNOWN_MULTIPLE == 0 for x in tensors for n in (x.data_ptr(), x.stride(0), x.shape[1]))


@lru_cache
def say_unaligned(*shapes: tuple[int, ...]) -> None:
    """Warn, once per shapes, that a launch reads its rows a number at a time."""
    _log.warning(
        "rows of %s are not all of multiples of %d numbers from a multiple of %d bytes on, and take the kernels' slow "
        "tiles: pad the hidden size, or copy views (a shard's parameter may begin anywhere) by .clone()",
        " and ".join(str(list(shape)) for shape in shapes),
        _KNOWN_MULTIPLE,
        _KNOWN_MULTIPLE,
    )


def operand(tensor: Tensor, block: tuple[int, int], config: TileConfig) -> Tensor | TensorDescriptor:
    """A matrix as a kernel takes it: a descriptor of blocks for bulk copies, else the tensor, for its pointer."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if config.bulk else tensor


def launch(kernel: Any, programs: int, *, on: Tensor, options: dict[str, int], **arguments: Any) -> None:
    """Run a kernel's programs on the device of `on`, whichever is current; zero programs launch nothing.

    Args:
        arguments: the kernel's parameters by name; a missing or misspelt one is a TypeError.
    """
    if programs:
        with torch.cuda.device_of(on):
            kernel[(programs,)](**arguments, **options, **FP_FUSION)
