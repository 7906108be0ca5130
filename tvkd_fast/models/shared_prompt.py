"""Attention over packed pairs that share their prompts: each response sees its prompt and itself.

A row is [prompt | chosen | rejected], pair after pair. Prompt and chosen response are a causal sequence as they lie;
the rejected one attends to its prompt and to itself. Two calls per pair, and no mask over the row: what a mask would
take away is not computed. flash-attn takes all pairs' sequences in one call, over keys among which the prompts stand
twice, and FlexAttention, on a GPU, is given the same as a mask by blocks. The function stands where transformers looks
its attention up, by name; a call without a layout goes to the implementation that was there before.

Letters: P pairs, L tokens of a row, H heads, G key heads, E their size, T queries and S keys of one sequence; N keys of
all sequences and M tokens of prompts that stand twice among them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad, scaled_dot_product_attention

from tvkd_fast._compat import attention_of, flash_varlen, with_attention
from tvkd_fast.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layout = Sequence[tuple[int, int, int, int]]
"""For each pair of a packed row, the starts of its prompt, chosen and rejected response, and its end."""
FLASH = ("flash_attention_2", "flash_attention_3")
HANDLED = ("sdpa", "eager", "flex_attention", *FLASH)
WITH_SINKS = ", which the model has: set --model.attn_implementation eager and --model.packing padded"
PREFIX = "tvkd_packed_"
# transformers would import a kernel by a name that has "flash" in it.
NAMES = {before: PREFIX + before.replace("flash", "varlen") for before in HANDLED}
"""The name under which attention over packed rows is registered, by the implementation for rows that are not packed."""


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


@dataclass(frozen=True)
class Twice:
    """Which tokens of a row stand twice among the keys of its sequences, and where."""

    tokens: Tensor
    """(N,) the token of each key."""
    first: Tensor
    """(L,) the first place of each token among the keys."""
    shared: Tensor
    """(M,) the tokens that have a second place."""
    second: Tensor
    """(M,) that place."""


@dataclass(frozen=True)
class Sequences:
    """A row's sequences as flash-attn's varlen function takes them, in the order of their queries in the row."""

    queries: Tensor
    """int32: the sequences' starts among the L queries, and L."""
    keys: Tensor
    """int32: the sequences' starts among the N keys, and N."""
    longest_query: int
    longest_key: int
    twice: Twice | None
    """None where every token is a key once, as it lies."""


@lru_cache(maxsize=4)
def sequences(layout: Layout, device: torch.device) -> Sequences:
    """A row's sequences, without empty ones; the same ones serve every layer, and no layer asks the device for a size.

    Two sequences per pair: prompt and chosen response by themselves, rejected response over prompt and itself.
    """
    lengths: list[tuple[int, int]] = []
    tokens: list[int] = []
    first: list[int] = []
    shared: list[int] = []
    second: list[int] = []
    for prompt, chosen, rejected, end in layout:
        lengths.append((rejected - prompt, rejected - prompt))
        first += range(len(tokens), len(tokens) + rejected - prompt)
        tokens += range(prompt, rejected)
        lengths.append((end - rejected, chosen - prompt + end - rejected))
        if end > rejected:
            second += range(len(tokens), len(tokens) + chosen - prompt)
            shared += range(prompt, chosen)
            tokens += range(prompt, chosen)
        first += range(len(tokens), len(tokens) + end - rejected)
        tokens += range(rejected, end)
    queries, keys = zip(*(length for length in lengths if length[0]), strict=True)

    def starts(sizes: Sequence[int]) -> Tensor:
        return to_device(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32), device)

    # What is made in inference mode could not be kept for a later backward.
    with torch.inference_mode(False):
        places = (tokens, first, shared, second)
        twice = Twice(*(to_device(torch.tensor(x), device) for x in places)) if shared else None
        return Sequences(starts(queries), starts(keys), max(queries), max(keys), twice)


class _Repeated(torch.autograd.Function):
    """x[twice.tokens]; (L, G, E) to (N, G, E).

    The backward reads each token's one or two gradients, in this order. That of `index_select` would add all N of them
    to zeros one by one, by atomics on a GPU; that of a concatenation is two small sums per pair.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, twice: Twice) -> Tensor:
        ctx.twice = twice
        return x.index_select(0, twice.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        twice: Twice = ctx.twice
        found = grad.index_select(0, twice.first)
        sums = found.index_select(0, twice.shared) + grad.index_select(0, twice.second)
        return found.index_copy_(0, twice.shared, sums), None


def attend_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    implementation: str,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same as `attend` by one call of flash-attn's varlen function, which aligns queries to the last of their keys.

    `sinks` (H,) are handed on. Raises ValueError where the flash-attn that is installed has no parameter for what the
    layer asks for.
    """
    varlen, arguments = flash_varlen(implementation)
    row = sequences(tuple(layout), query.device)
    # The batch of one by a squeeze, whose gradient is a view: that of an index would be written.
    query, key, value = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    if row.twice is not None:
        key, value = (_Repeated.apply(x, row.twice) for x in (key, value))
    size, missing = value.shape[-1], key.shape[-1] - value.shape[-1]
    if missing:
        value = pad(value, [0, missing])
    given = arguments(
        query_length=query.shape[0],
        key_length=row.longest_key,
        is_causal=True,
        dropout=0.0,
        softmax_scale=scaling,
        sliding_window=window,
        softcap=softcap,
        # Left open, it is what transformers reads from FLASH_ATTENTION_DETERMINISTIC.
        deterministic=True if torch.are_deterministic_algorithms_enabled() else None,
        s_aux=None if sinks is None else sinks.to(query.dtype),
        max_seqlen_q=row.longest_query,
        max_seqlen_k=row.longest_key,
    )
    narrow = window is not None and window < row.longest_key
    for what, asked, name in (("sliding windows", narrow, "window_size"), ("softcaps", softcap is not None, "softcap")):
        if asked and name not in given:
            raise ValueError(f"{implementation} has no {what}: set --model.attn_implementation eager")
    if sinks is not None and given.keys().isdisjoint({"s_aux", "learnable_sink"}):
        raise ValueError(f"{implementation} has no attention sinks{WITH_SINKS}")
    found = varlen(query, key, value, cu_seqlens_q=row.queries, cu_seqlens_k=row.keys, **given)
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return (out[..., :size] if missing else out).unsqueeze(0)


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
    if before in NAMES.values():
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
    AttentionInterface.register(NAMES[before], _instead_of(before))
    AttentionMaskInterface.register(NAMES[before], AttentionMaskInterface()[before])
    model.set_attn_implementation(NAMES[before])
    if attention_of(model.config) != NAMES[before]:
        raise ValueError(
            f"{type(model).__name__} does not look its attention up where transformers lets it be replaced: set "
            "--model.packing unshared or padded"
        )


def unpacked_attention(config: Any) -> str:
    """The name of a model's attention for rows that are not packed, which it was loaded with."""
    name = attention_of(config)
    return next((before for before, ours in NAMES.items() if name == ours), name)


def keep_uncompiled(model: PreTrainedModel) -> None:
    """Let torch.compile step around the model's packed attention: its layout is other numbers in every batch."""
    from transformers import AttentionInterface

    name, before = attention_of(model.config), unpacked_attention(model.config)
    if name != before:
        AttentionInterface.register(name, torch.compiler.disable(_instead_of(before)))


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
            seen = with_attention(module, before) if before in FLASH else module
            return _own_attention(module, before)(seen, query, key, value, attention_mask, **options)
        window = options.get("sliding_window")
        if window is None and _slides(module):
            raise ValueError(
                f"{type(module).__name__} keeps its sliding window from its attention: set --model.packing unshared"
            )
        if before == "flex_attention":
            mask = block_mask(tuple(layout.layout), window, query.device)
            return _own_attention(module, before)(module, query, key, value, mask, **options)
        how = {"scaling": options.get("scaling"), "softcap": options.get("softcap"), "window": window}
        sinks = options.get("s_aux")
        if before in FLASH:
            query, key, value = _in_16_bits(module, query, key, value)
            return attend_flash(query, key, value, layout.layout, before, sinks=sinks, **how), None
        if sinks is not None:
            raise ValueError(f"shared prompts by {before} have no attention sinks{WITH_SINKS}")
        return attend(query, key, value, layout.layout, **how), None

    return attention


def _in_16_bits(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
    """Cast as transformers does before its own call of flash-attn: norms or rotations may have left float32."""
    from transformers.integrations.flash_attention import get_target_dtype

    dtype = get_target_dtype(query, module)
    return (query, key, value) if dtype is None else [x.to(dtype) for x in (query, key, value)]


def _slides(module: nn.Module) -> bool:
    kinds: Sequence[str] | None = getattr(getattr(module, "config", None), "layer_types", None)
    return kinds is not None and kinds[getattr(module, "layer_idx", 0)] == "sliding_attention"


def _own_attention(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An eager attention is each family's own, and stands in its module under a name that all families use."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
