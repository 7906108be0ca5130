"""The tensors of a backbone's forward that its backward needs, counted on shapes without storage.

Letters: L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tvkd_fast._compat import TorchDispatchMode, fake_tensors, operators, storage_id
from tvkd_fast.distributed.recompute import KEPT
from tvkd_fast.models import PolicyWithHead, model_config
from tvkd_fast.models.prune import config_of_layers
from tvkd_fast.models.shared_prompt import Layout, states_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


GROUPED = operators("_grouped_mm")
"""The products of a mixture's experts."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one block, and of what lies around the blocks (embedding, final norm, rotary tables)."""

    everything: int
    """All that a block's backward wants."""
    products: int
    """Results of its products and of its attention, and its input."""
    around: int

    def of(self, layers: int, recompute: str, row: int) -> int:
        """Return the bytes of all blocks, with one that is recomputed; `row` is the size of a block's input."""
        if recompute == "none":
            return self.around + layers * self.everything
        held = self.products if recompute == "selective" else row
        return self.around + layers * held + self.everything


@lru_cache
def count_activations(
    model: str,
    tokens: int,
    layout: Layout | None,
    *,
    sequences: int = 0,
    autocast: torch.dtype | None,
    trust_remote_code: bool = False,
) -> Activations:
    """Count one block of the model over one row of `tokens`, by a CPU's attention, with a weight that autocast casts.

    A `layout` is given where prompts are shared, and whole rows where it is None. `sequences` of the tokens lie in rows
    of their own where they are padded, which only families whose attention cannot be replaced are counted by.
    """
    config = model_config(model, trust_remote_code=trust_remote_code)
    # Families reckon with more blocks than one, and the first of them may be of a kind of its own.
    two, three = (
        _saved(_made(config, layers, trust_remote_code), tokens, layout, sequences, autocast) for layers in (2, 3)
    )
    everything = three.saved - two.saved
    return Activations(
        everything=everything,
        products=three.products - two.products + three.row,
        around=two.saved - 2 * everything,
    )


@dataclass(frozen=True)
class _Count:
    """Bytes of a forward."""

    saved: int
    """Bytes that it saves for its backward."""
    products: int
    """Bytes that the products of all blocks return."""
    row: int
    """Bytes of a block's input."""


def _made(config: Any, layers: int, trust_remote_code: bool) -> Callable[[], PreTrainedModel]:
    """Return a function that makes a model of the first `layers` blocks, repeated where there are fewer."""
    from transformers import AutoModelForCausalLM

    few = config_of_layers(config, [i % config.num_hidden_layers for i in range(layers)])
    return partial(AutoModelForCausalLM.from_config, few, trust_remote_code=trust_remote_code)


def _saved(
    make: Callable[[], PreTrainedModel],
    tokens: int,
    layout: Layout | None,
    sequences: int,
    autocast: torch.dtype | None,
) -> _Count:
    """Return the count of the first attempt that the family accepts: with the attention of packed rows, or its own
    where no prompt is shared; on shapes alone, or with weights as drawn where shapes depend on numbers (how many tokens
    an expert gets).
    """
    attentions = (False,) if layout is not None else (False, True)
    *attempts, last = [(own, mode) for mode in (fake_tensors, nullcontext) for own in attentions]
    for own, mode in attempts:
        # Of torch's refusals to reckon with shapes all are such errors; the last attempt's is the user's to see.
        with suppress(RuntimeError, ValueError), mode():
            return _forward(make(), tokens, layout, sequences, autocast, own=own)
    own, mode = last
    try:
        with mode():
            return _forward(make(), tokens, layout, sequences, autocast, own=own)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"it cannot be called with rows of this packing ({why}): set --model.packing padded"
        ) from error


def _forward(
    model: PreTrainedModel,
    tokens: int,
    layout: Layout | None,
    sequences: int,
    autocast: torch.dtype | None,
    *,
    own: bool,
) -> _Count:
    policy = PolicyWithHead(model, packing="padded" if own else "shared", autocast=autocast, probe=False).train()
    weights = {storage_id(p) for p in policy.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def save(x: Tensor) -> Tensor:
        # Kept, so that no other storage gets its address.
        alive.append(x)
        if storage_id(x) not in weights:
            sizes[storage_id(x)] = x.untyped_storage().nbytes()
        return x

    products = _Products()
    with saved_tensors_hooks(save, lambda x: x), policy.precision(), products:
        # A whole row is a prompt without responses: transformers' own attention would make a mask here, since it cannot
        # see that none is needed.
        whole = None if own else layout or ((0, tokens, tokens, tokens),)
        rows = max(1, sequences) if own else 1
        states = states_of(policy.model, torch.zeros(rows, -(-tokens // rows), dtype=torch.long), whole)
    return _Count(sum(sizes.values()), products.bytes, tokens * states.shape[-1] * products.itemsize)


class _Products(TorchDispatchMode):
    """Sums up what those ops return whose results selective checkpointing keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.itemsize = 0, 4

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in GROUPED:
            # Its shapes are known to torch in bfloat16 alone.
            out = args[0].new_empty(args[0].shape[:-1] + args[1].shape[-1:])
        else:
            out = func(*args, **(kwargs or {}))
        if func in KEPT:
            results = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in results)
        return out
