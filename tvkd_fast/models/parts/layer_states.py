"""States of a backbone's inner layers, as its head would read them.

Letters: L tokens of a row, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tvkd_fast.models.prune import block_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Raise ValueError where one of the layers is not an inner one: from 1, after the first block, to the last but
    one."""
    _, blocks = block_list(model, "to look into")
    for layer in layers:
        if not 1 <= layer < len(blocks):
            raise ValueError(
                f"layer {layer} is no inner one of {len(blocks)}: choose between 1, after the first block, and "
                f"{len(blocks) - 1}, before the last"
            )
    if any(getattr(block, "_compiled_call_impl", None) is not None for block in blocks):
        raise ValueError("a compiled block does not show its states: leave --model.compile out")


def with_layer_states(
    model: PreTrainedModel, layers: Sequence[int], call: Callable[[], Tensor], positions: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """[len(positions), D] states of `call`, a call of the model that returns its last ones, [rows, L, D], at flat
    positions; and those after each of the layers, with the final norm applied, as if the model ended there.

    States of other layers are not kept. Differentiable. Raises ValueError for a family whose last states are not the
    final norm of its last block's.
    """
    _, blocks = block_list(model, "to look into")
    found: dict[int, Tensor] = {}
    norms: list[nn.Module] = []

    def keep(layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, arguments: Any, output: Any) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if arguments and arguments[0] is found.get(len(blocks)):
            norms.append(module)
            found[0] = output

    outside = [module for module in _holder(model, blocks).children() if module is not blocks]
    with ExitStack() as hooks:
        for layer in {*layers, len(blocks)}:
            hooks.callback(blocks[layer - 1].register_forward_hook(keep(layer)).remove)
        for module in outside:
            hooks.callback(module.register_forward_hook(note).remove)
        last = call()
    if len(norms) != 1 or found[0] is not last:
        raise ValueError(
            f"{type(model).__name__} does more to its last block's states than to norm them, which could not be done "
            "to inner ones: choose a policy of another family"
        )
    inner = tuple(norms[0](found[layer].flatten(0, 1)[positions]) for layer in layers)
    return last.flatten(0, 1)[positions], inner


def _holder(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    return next(module for module in model.modules() if any(child is blocks for child in module.children()))
