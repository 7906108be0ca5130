"""flash-attn 2 and 3 in plain torch, by the interface that they document, and what is asked of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import modeling_flash_attention_utils
from transformers.modeling_flash_attention_utils import _lazy_define_process_function, _pad_input, _unpad_input

from tvkd_fast.models.shared_prompt import FLASH


def of_one_sequence(q, k, v, scale, causal, window, softcap):
    """q [T, H, E], k and v [S, G, E] to [T, H, E]: flash-attn's documented semantics, aligned to the bottom right.

    float64 is let through beside flash-attn's own 16 bits, to compare with.
    """
    if not q.dtype == k.dtype == v.dtype or q.dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    left, right = (None if size < 0 else size for size in window)
    right = 0 if causal else right
    distance = torch.arange(len(k)) - (torch.arange(len(q)) + len(k) - len(q))[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("the,she->hts", q.to(wide), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hts,she->the", weights, v).to(q.dtype)


def varlen_reference(q, k, v, starts_q, starts_k, longest_q, longest_k, scale, causal, window, softcap):
    """The same of every sequence, with what the kernels take for granted."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[1] % k.shape[1] == 0
    for x, starts, longest in ((q, starts_q, longest_q), (k, starts_k, longest_k), (v, starts_k, longest_k)):
        assert x.stride(-1) == 1
        assert starts.dtype == torch.int32
        assert (int(starts[0]), int(starts[-1])) == (0, len(x))
        assert int(starts.diff().max()) == int(longest)
    borders = zip(*(starts.tolist() for starts in (starts_q, starts_q[1:], starts_k, starts_k[1:])), strict=False)
    return torch.cat(
        [of_one_sequence(q[a:b], k[c:d], v[c:d], scale, causal, window, softcap) for a, b, c, d in borders]
    )


@dataclass
class FlashAttn:
    """What is asked of flash-attn."""

    named: list[str] = field(default_factory=list)
    varlen: list[dict[str, Any]] = field(default_factory=list)
    dense: int = 0


def put_in_place(monkeypatch):
    """Let transformers find the reference for both, and note what is asked."""
    found = FlashAttn()

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        found.varlen.append(locals())
        assert dropout_p == 0
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return varlen_reference(q, k, v, *lengths, softmax_scale, causal, window_size, softcap)

    def flash_attn_3_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
    ):
        found.varlen.append(locals())
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return varlen_reference(q, k, v, *lengths, softmax_scale, causal, window_size, softcap), None

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
    ):
        found.dense += 1
        rows = (of_one_sequence(*row, softmax_scale, causal, window_size, softcap) for row in zip(q, k, v, strict=True))
        return torch.stack(list(rows))

    functions = dict(zip(FLASH, (flash_attn_varlen_func, flash_attn_3_varlen_func), strict=True))

    def lazily(implementation, *_, **__):
        found.named.append(implementation)
        varlen = functions[implementation]
        arguments = _lazy_define_process_function(varlen)
        several = hasattr(modeling_flash_attention_utils, "_process_with_kvcache_kwargs_fn")
        found_by_name = flash_attn_func, varlen, None, _pad_input, _unpad_input
        return found_by_name, ((arguments, dict) if several else arguments)

    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lazily)
    return found


def by_flash(model, implementation=FLASH[0]):
    """The model as one that was loaded with flash-attn, which transformers refuses where there is none."""
    model.config._attn_implementation_internal = implementation
    return model
