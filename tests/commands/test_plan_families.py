"""A dry run of every kind of model that trains: what is counted is what there is."""

import pytest
from transformers import GPT2Config, GPTJConfig, OPTConfig, Qwen3MoeConfig

from tvkd_fast.commands.models import load_policy
from tvkd_fast.commands.plan import plan
from tvkd_fast.models import model_shape, save_model
from tvkd_fast.models.settings import LoraConfig, ModelConfig
from tvkd_fast.planning.footprint import Footprint, PairTokens

IDS = {"vocab_size": 262, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = IDS | {"hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
GPT = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
EXPERTS = {"intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "gpt2": (GPT2Config(**GPT), "shared"),
    "opt": (OPTConfig(**SHAPE, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32), "shared"),
    "qwen3_moe": (Qwen3MoeConfig(**SHAPE, **HEADS, **EXPERTS), "shared"),
    # Attention of its own, which packed rows have no place in.
    "gptj": (GPTJConfig(**GPT, rotary_dim=4), "padded"),
}


@pytest.fixture(scope="module")
def family_folder(tiny_model, chatml, tmp_path_factory):
    """A tiny model of a family, on disk."""
    folders = {}

    def make(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            save_model(tiny_model(config=FAMILIES[name][0]), chatml, folders[name])
        return str(folders[name])

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_trains_is_planned(name, family_folder, make_config):
    folder, packing = family_folder(name), FAMILIES[name][1]
    config = make_config(objective="dpo", policy=folder, model=ModelConfig(packing=packing))
    policy = load_policy(folder, config.model)
    text = plan(config)
    assert f"{folder}: {sum(p.numel() for p in policy.parameters()) / 1e6:,.1f} M parameters, 2 layers" in text
    assert "activations" in text


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_adapters_beside_other_weights_than_linear_layers_are_counted(name, family_folder, make_config):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")
    folder, lora = family_folder(name), LoraConfig(rank=3)
    policy = load_policy(folder, ModelConfig(), lora=lora)
    learning = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    config = make_config(policy=folder, lora=lora)
    assert Footprint(config, model_shape(folder), None, PairTokens(20, 40, 40, 60), 1).learning == learning
