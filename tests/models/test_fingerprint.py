"""The contents of a model's fingerprint, which leaves out only what the run itself added."""

import pytest
import torch

from tvkd_fast.models import Lora, PolicyWithHead, add_lora, fingerprint_model, load_model, save_model
from tvkd_fast.models.lora import ADAPTER


def test_what_changes_a_number_changes_it(tiny_model):
    model = tiny_model()
    plain = fingerprint_model(model)
    assert plain.startswith("model:")
    for change in (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
    ):
        other = tiny_model(**change)
        other.load_state_dict(model.state_dict())
        assert fingerprint_model(other) != plain, change


def test_what_changes_none_does_not(tiny_model, tmp_path):
    model = tiny_model()
    plain = fingerprint_model(model)
    save_model(model, None, tmp_path)
    again = load_model(tmp_path, attn_implementation="eager")
    again.config.use_cache, again.config.attention_dropout, again.config.pad_token_id = False, 0.1, 7
    assert fingerprint_model(again) == plain
    assert fingerprint_model(PolicyWithHead(again, packing="shared").model) == plain


def test_a_saved_buffer_is_held(tiny_model):
    model = tiny_model()
    model.model.layers[0].mlp.register_buffer("correction", torch.zeros(4))
    before = fingerprint_model(model)
    model.model.layers[0].mlp.correction += 1
    assert fingerprint_model(model) != before


@pytest.fixture
def adapted(tiny_model):
    """A model with an adapter of a scale, as transformers puts one beside the weights."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")

    def make(alpha, name="default"):
        model = tiny_model()
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]), name)
        torch.manual_seed(1)
        with torch.no_grad():
            for key, x in model.named_parameters():
                if ".lora_" in key:
                    x.normal_()
        return model

    return make


def test_an_adapter_that_a_model_came_with_is_held_with_its_scale(adapted, tiny_model):
    one = adapted(4)
    found = {fingerprint_model(model) for model in (tiny_model(), one, adapted(8))}
    assert len(found) == 3
    one.disable_adapters()
    assert fingerprint_model(one) not in found


def test_the_runs_own_adapter_is_not(adapted, tiny_model):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")
    plain = fingerprint_model(tiny_model())
    assert fingerprint_model(adapted(4, ADAPTER)) == plain
    policy = PolicyWithHead(tiny_model())
    add_lora(policy, Lora(2, 4.0))
    assert fingerprint_model(policy.model) == plain
