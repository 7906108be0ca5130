"""Temporary changes of a model, and their reversal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.lent import dropouts, moves_with, on_base_of, undone

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": {
            name: (x, type(x), x.training, dropouts(x), dict(x._forward_hooks), set(vars(x)))
            for name, x in model.named_modules()
        },
        "parameters": {name: (p, p.requires_grad) for name, p in model.named_parameters()},
    }


def change(model: Any) -> None:
    """Change the model as this library does."""
    PolicyWithHead(model, packing="shared", probe=False).eval().requires_grad_(False)
    model.register_forward_hook(lambda *_: None)


def change_all(model: Any) -> None:
    """Change the model as a trainer does: other layers, attributes and parameters."""
    change(model)
    model.model.layers[0].self_attn.q_proj = nn.Sequential(model.model.layers[0].self_attn.q_proj)
    model.model.layers[0].own = 1
    model.model.norm.weight = nn.Parameter(torch.zeros(32))


@pytest.mark.parametrize("fused", [False, True])
def test_it_comes_back_after_success_and_failure(tiny_model: Callable[..., Any], fused: bool) -> None:
    model = tiny_model(0, attention_dropout=0.1).train()
    if fused:
        PolicyWithHead(model)
        model.lm_head.stats = "its owner's"
    model.model.layers[0].eval()
    before, attention = state_of(model), model.config._attn_implementation
    with undone(model):
        change(model)
        model.lm_head.stats = "another's"
        assert state_of(model) != before
    assert state_of(model) == before
    assert getattr(model.lm_head, "stats", None) == ("its owner's" if fused else None)

    def fail() -> None:
        with undone(model, on_error=True):
            change_all(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert state_of(model) == before
    assert model.config._attn_implementation == attention
    with undone(model, on_error=True):
        change_all(model)
    assert state_of(model) != before


def test_what_a_policys_training_changes(tiny_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")
    base, other = tiny_model(0), tiny_model(1)
    assert moves_with(base, base)
    assert not moves_with(other, base)
    other.model.embed_tokens.weight = base.model.embed_tokens.weight
    assert moves_with(other, base)
    assert not on_base_of(other, base)
    policy = peft.get_peft_model(base, peft.LoraConfig(**LORA, modules_to_save=["lm_head"]))
    assert on_base_of(base, policy)
    assert not on_base_of(tiny_model(0), policy)
    # The adapters move, and are off while the base is asked.
    assert not moves_with(base, policy)
    base.model.norm.weight.requires_grad_(True)
    assert moves_with(base, policy)
