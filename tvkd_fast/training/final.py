"""The folders that a run leaves: a model that `from_pretrained` loads, and its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tvkd_fast.distributed import World, full_weights
from tvkd_fast.files import whole_folder
from tvkd_fast.models import (
    PolicyWithHead,
    is_adapter,
    merged,
    save_adapter,
    save_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


FINAL, ADAPTER = "final", "adapter"

EXPORTED = "exported.json"
"""The file beside final/ that identifies the run of its model."""


def save_final(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str | None = None,
) -> None:
    """Write the model whole or not at all: a folder of this name is never half of one. `weights` None: its own."""
    with whole_folder(folder, "the model") as partial:
        save_model(model, tokenizer, partial, weights)
        if card is not None:
            (partial / "README.md").write_text(card)


def save_trained(
    policy: PolicyWithHead, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World, card: str
) -> None:
    """Save a policy that processes share, as `save_final` does; the first process writes. Adapters are merged, and also
    saved by themselves beside the model."""
    adapted = any(is_adapter(name) for name, _ in policy.named_parameters())
    weights = full_weights(policy) if world.mesh is not None or adapted else None
    problem = None
    if world.first:
        try:
            if adapted:
                assert weights is not None
                with whole_folder(folder.with_name(ADAPTER), "the adapter") as partial:
                    save_adapter(policy.model, weights, partial)
                save_final(*merged(policy.model, weights), tokenizer, folder, card)
            else:
                save_final(policy.model, weights, tokenizer, folder, card)
        except Exception as error:
            if world.size == 1:
                raise
            problem = str(error)
    problem = world.broadcast(problem)
    if problem is not None:
        raise ValueError(problem)
