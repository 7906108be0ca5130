"""Counted on tensors without storage, and on those that a backward really keeps."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tvkd_fast.commands.models import load_policy
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.models.shared_prompt import states_of
from tvkd_fast.planning.activations import count_activations

LAYOUT = ((0, 5, 9, 16), (16, 20, 27, 30))
TOKENS = 30


def saved(policy, layout):
    """Bytes of storages that are kept, but for the weights'."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with saved_tensors_hooks(pack, lambda x: x), policy.precision():
        states_of(policy.model, torch.ones(1, TOKENS, dtype=torch.long), layout)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("layout", [LAYOUT, None])
@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
def test_what_is_counted_is_kept(layout, autocast, model_folder):
    folder = model_folder(num_hidden_layers=3)
    dtype = torch.bfloat16 if autocast == "bfloat16" else None
    policy = load_policy(folder, ModelConfig(packing="padded" if layout is None else "shared", autocast=autocast))
    counted = count_activations(folder, TOKENS, layout, autocast=dtype)
    kept = saved(policy.train(), layout)
    # A whole row's keys and values are copied once more where it is counted.
    assert counted.of(3, "none", 0) == kept if layout else kept <= counted.of(3, "none", 0) <= 1.15 * kept


def test_blocks_that_are_computed_again_keep_their_input(model_folder):
    folder = model_folder(num_hidden_layers=3)
    policy = load_policy(folder, ModelConfig(packing="shared", activation_checkpointing="full"))
    counted = count_activations(folder, TOKENS, LAYOUT, autocast=None)
    row = 4 * TOKENS * policy.model.config.hidden_size
    held = counted.of(3, "full", row)
    # The first block's input and the last one's output lie around the blocks as well.
    assert held - counted.everything == pytest.approx(saved(policy.train(), LAYOUT), abs=2 * row)
    assert row < counted.products < counted.everything
    assert held < counted.of(3, "selective", row) < counted.of(3, "none", row) + counted.everything
