"""Attention over packed pairs that share their prompts: each response sees its prompt and itself.

A row is [prompt | chosen | rejected], pair after pair. Prompt and chosen response are a causal sequence as they lie;
the rejected one attends to its prompt and to itself. Two calls per pair, and no mask over the row: what a mask would
take away is not computed. FlexAttention, on a GPU, is given the same as a mask by blocks. The function stands where
transformers looks its attention up, by name; a call without a layout goes to the implementation that was there before.

Letters: P pairs, L tokens of a row, H heads, G key heads, E their size, T queries and S keys of one sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from tvkd_fast._compat import attention_of
from tvkd_fast.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layout = Sequence[tuple[int, int, int, int]]
"""For each pair of a packed row, the starts of its prompt, chosen and rejected response, and its end."""
PREFIX = "tvkd_packed_"
"""The prefix of the attention's name; the rest names the implementation for rows that are not packed."""
HANDLED = ("sdpa", "eager", "flex_attention")


class Held:
    """A layout on its way through a model: torch.compile guards a tuple's length, and of this no more than its type."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout


def positions(layout: Layout, device: torch.device) -> Tensor:
    """[1, L] position ids: a rejected response goes on from its prompt, as the chosen one does."""
    parts = []
    for prompt, chosen, rejected, end in layout:
        border = chosen - prompt
        parts += [torch.arange(rejected - prompt), torch.arange(border, border + end - rejected)]
    return to_device(torch.cat(parts)[None], device)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """query [1, H, L, E], key and value [1, G, L, E] to [1, L, H, E]; `window` keys are seen, one's own among them."""
    parts = [(chosen - prompt, rejected - chosen, end - rejected) for prompt, chosen, rejected, end in layout]
    # Split and not sliced: the gradient of each slice would be written as large as the row.
    queries = iter(query.split([size for p, c, r in parts for size in (p + c, r)], 2))
    keys, values = (iter(x.split([size for part in parts for size in part], 2)) for x in (key, value))
    rows = []
    for _ in parts:
        seen = [(next(x), next(x), next(x)) for x in (keys, values)]
        for query_, other in ((next(queries), 1), (next(queries), 2)):
            if query_.shape[2]:
                own = (torch.cat([x[0], x[other]], 2) for x in seen)
                rows.append(causal(query_, *own, scaling=scaling, softcap=softcap, window=window))
    return torch.cat(rows, 2).transpose(1, 2)


def causal(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, softcap: float | None, window: int | None
) -> Tensor:
    """Attention of a sequence's last T queries to its S keys: query i sees keys up to i + S − T, `window` of them."""
    t, s = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    if softcap is None and t == s and (window is None or s <= window):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    place = torch.arange(s - t, s, device=query.device)[:, None]
    other = torch.arange(s, device=query.device)
    mask = other <= place
    if window is not None:
        mask &= other > place - window
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    return weights.to(query.dtype) @ value


@lru_cache(maxsize=4)
def block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """FlexAttention's mask of a row; the same one serves every layer of a kind."""
    length = layout[-1][3]
    return create_block_mask(sees(layout, window, device), None, None, length, length, device=str(device))


def sees(layout: Layout, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """Return whether a token of the row sees another, as FlexAttention asks it: (batch, head, query, key) to bool."""
    lengths = torch.tensor([[b - a, c - b, d - c] for a, b, c, d in layout])
    part = torch.arange(3).repeat(len(layout)).repeat_interleave(lengths.flatten()).to(device)
    pair = torch.arange(len(layout)).repeat_interleave(lengths.sum(1)).to(device)
    place = positions(layout, device)[0]

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (pair[q] == pair[k]) & ((part[k] == 0) | (part[k] == part[q])) & (place[k] <= place[q])
        return seen if window is None else seen & (place[k] > place[q] - window)

    return visible


def share_prompts(model: PreTrainedModel) -> None:
    """Let the model's attention read a `layout`, as `base_model(…, layout=Held(layout))` passes it down.

    Raises ValueError where it cannot: the attention that the model was loaded with is none that this stands in for, or
    its layers are not all of full or sliding attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    before = attention_of(model.config)
    if before.startswith(PREFIX):
        return
    if before not in HANDLED:
        raise ValueError(
            f"shared prompts need {', '.join(HANDLED[:-1])} or {HANDLED[-1]}, and the model was loaded with {before}: "
            "set --model.attn_implementation sdpa, or --model.packing unshared"
        )
    text = model.config.get_text_config()
    odd = sorted(set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    if odd:
        raise ValueError(
            f"{type(model).__name__} has layers of {', '.join(odd)}, in which a response would see more than its own "
            "prompt and itself: set --model.packing unshared"
        )
    AttentionInterface.register(PREFIX + before, _instead_of(before))
    AttentionMaskInterface.register(PREFIX + before, AttentionMaskInterface()[before])
    model.set_attn_implementation(PREFIX + before)
    if attention_of(model.config) == before:
        raise ValueError(
            f"{type(model).__name__} does not look its attention up where transformers lets it be replaced: set "
            "--model.packing unshared or padded"
        )


def keep_uncompiled(model: PreTrainedModel) -> None:
    """Let torch.compile step around the model's packed attention: its layout is other numbers in every batch."""
    from transformers import AttentionInterface

    name = attention_of(model.config)
    if name.startswith(PREFIX):
        AttentionInterface.register(name, torch.compiler.disable(_instead_of(name.removeprefix(PREFIX))))


def states_of(
    model: PreTrainedModel, input_ids: Tensor, layout: Layout | None, attention_mask: Tensor | None = None
) -> Tensor:
    """[rows, L] ids to [rows, L, D] states: of rows on their own, or of one packed row, which takes no mask."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:
        assert layout is None
        inputs["attention_mask"] = attention_mask
    if not model.config.return_dict:
        inputs["return_dict"] = True
    if layout is not None:
        # Where they begin anew, transformers' own attention begins a sequence.
        inputs["position_ids"] = positions(layout, input_ids.device)
        if attention_of(model.config).startswith(PREFIX):
            # A mask of four dimensions is taken as it is: none is made for the row, and our attention looks at none.
            unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
            inputs |= {"layout": Held(layout), "attention_mask": unread}
        elif any(end > rejected for _, _, rejected, end in layout):
            raise ValueError("the batch shares prompts and the model was not made to: PolicyWithHead(packing='shared')")
    return model.base_model(**inputs).last_hidden_state


def _instead_of(before: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layout: Held | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if layout is None:
            return _own_attention(module, before)(module, query, key, value, attention_mask, **options)
        window = options.get("sliding_window")
        if window is None and _slides(module):
            raise ValueError(
                f"{type(module).__name__} keeps its sliding window from its attention: set --model.packing unshared"
            )
        if before == "flex_attention":
            mask = block_mask(tuple(layout.layout), window, query.device)
            return _own_attention(module, before)(module, query, key, value, mask, **options)
        scaling, softcap = options.get("scaling"), options.get("softcap")
        return attend(query, key, value, layout.layout, scaling=scaling, softcap=softcap, window=window), None

    return attention


def _slides(module: nn.Module) -> bool:
    kinds: Sequence[str] | None = getattr(getattr(module, "config", None), "layer_types", None)
    return kinds is not None and kinds[getattr(module, "layer_idx", 0)] == "sliding_attention"


def _own_attention(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An eager attention is each family's own, and stands in its module under a name that all families use."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
