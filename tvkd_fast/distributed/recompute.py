"""Activation checkpointing: what of a block's forward is kept for its backward, and what is computed again."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tvkd_fast._compat import operators, recompute_blocks
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.settings import Recompute

KEPT = operators(
    "mm",
    "addmm",
    "bmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""The most expensive operations: "selective" keeps their results and recomputes the elementwise rest."""


def checkpoint_activations(policy: PolicyWithHead, mode: Recompute) -> None:
    """Keep every block's input alone ("full"), that and the results of its products ("selective"), or all that its
    backward wants ("none"). Gradients are the same; to be called before the policy is sharded.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    recompute_blocks(policy.model, options)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
