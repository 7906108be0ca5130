"""What a backward needs of a backbone's forward, counted on tensors that have shapes and no storage.

Letters: L tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tvkd_fast.distributed.recompute import KEPT
from tvkd_fast.models import PolicyWithHead, model_config
from tvkd_fast.models.prune import config_of_layers
from tvkd_fast.models.shared_prompt import Layout, states_of


@dataclass(frozen=True)
class Activations:
    """Bytes of one block, and of what lies around the blocks (embedding, final norm, rotary tables)."""

    everything: int
    """All that a block's backward wants."""
    products: int
    """Results of its products and of its attention, and its input."""
    around: int

    def of(self, layers: int, recompute: str, row: int) -> int:
        """Of all blocks, the one that is computed again among them; `row` is the size of a block's input."""
        if recompute == "none":
            return self.around + layers * self.everything
        held = self.products if recompute == "selective" else row
        return self.around + layers * held + self.everything


@lru_cache
def count_activations(
    model: str, tokens: int, layout: Layout | None, *, autocast: torch.dtype | None, trust_remote_code: bool = False
) -> Activations:
    """Of the model's first block over one row of `tokens`, on a CPU's attention; a weight that autocast casts is in it.

    A `layout` is given where prompts are shared, and whole rows where it is None.
    """
    (one, kept), (two, _) = (_saved(model, layers, tokens, layout, autocast, trust_remote_code) for layers in (1, 2))
    return Activations(everything=two - one, products=kept, around=2 * one - two)


def _saved(
    name: str,
    layers: int,
    tokens: int,
    layout: Layout | None,
    autocast: torch.dtype | None,
    trust_remote_code: bool,
) -> tuple[int, int]:
    """Bytes that are saved for the backward, and bytes that the products of the blocks return."""
    from transformers import AutoModelForCausalLM

    config = model_config(name, trust_remote_code=trust_remote_code)
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(
            config_of_layers(config, list(range(layers))), trust_remote_code=trust_remote_code
        )
        policy = PolicyWithHead(model, packing="shared", autocast=autocast, probe=False).train()
        weights = {_storage(p) for p in policy.parameters()}
        sizes: dict[int, int] = {}
        alive: list[Tensor] = []

        def save(x: Tensor) -> Tensor:
            # Kept, so that no other storage gets its address.
            alive.append(x)
            if _storage(x) not in weights:
                sizes[_storage(x)] = x.untyped_storage().nbytes()
            return x

        products = _Products()
        with saved_tensors_hooks(save, lambda x: x), policy.precision(), products:
            # A whole row is a prompt without responses: transformers' own attention would make a mask here, since it
            # cannot see that none is needed.
            whole = ((0, tokens, tokens, tokens),)
            states_of(policy.model, torch.zeros(1, tokens, dtype=torch.long), layout or whole)
    return sum(sizes.values()), products.bytes + tokens * config.hidden_size * products.itemsize


class _Products(TorchDispatchMode):
    """Sums up what those ops return whose results selective checkpointing keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.itemsize = 0, 4

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in KEPT:
            results = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in results)
        return out


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
