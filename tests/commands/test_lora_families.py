"""Adapters of every kind of layer are merged at a run's end, or refused before it; and runs go on from adapters."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PhimoeConfig, Qwen3MoeConfig

from tvkd_fast.models import fingerprint_weights, load_model, save_model
from tvkd_fast.models.settings import LoraConfig
from tvkd_fast.training.metrics import read_metrics

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

IDS = {"vocab_size": 262, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = IDS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "experts in one weight": Qwen3MoeConfig(
        **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "weights the other way round": GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None]).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_merged_whatever_they_are_beside(name, tiny_model, chatml, make_config, run, tmp_path):
    policy = tmp_path / "policy"
    save_model(tiny_model(config=FAMILIES[name]), chatml, policy)
    config = make_config(objective="dpo", policy=str(policy), lora=LoraConfig(rank=2), max_steps=2)
    run(config)
    out = Path(config.output_dir)
    final = logits(AutoModelForCausalLM.from_pretrained(out / "final"))
    base = AutoModelForCausalLM.from_pretrained(policy)
    assert (final - logits(base)).abs().max() > 1e-3
    torch.testing.assert_close(logits(load_model(out / "adapter")), final, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(base, out / "adapter")), final, rtol=1e-4, atol=1e-4
    )


def test_what_could_not_be_merged_is_refused_before_the_first_step(make_config, run):
    config = make_config(objective="dpo", lora=LoraConfig(rank=2, targets=["q_proj", "embed_tokens"]))
    with pytest.raises(ValueError, match=r"beside model\.embed_tokens could not be merged .* leave it out of --lora"):
        run(config)
    assert not read_metrics(Path(config.output_dir) / "metrics.jsonl")


def test_a_family_that_cannot_be_called_with_adapters_is_refused(tiny_model, chatml, make_config, run, tmp_path):
    save_model(tiny_model(config=PhimoeConfig(**SHAPE, num_local_experts=4)), chatml, tmp_path / "policy")
    config = make_config(objective="dpo", policy=str(tmp_path / "policy"), lora=LoraConfig(rank=2))
    with pytest.raises(ValueError, match=r"PhimoeForCausalLM cannot be called with these adapters .* --lora\.targets"):
        run(config)


def test_a_run_goes_on_from_an_adapter(make_config, run, files):
    first = make_config(objective="dpo", lora=LoraConfig(rank=2), max_steps=2, output_dir=str(files / "first"))
    run(first)
    adapter, final = files / "first" / "adapter", files / "first" / "final"
    found = {}
    for name, policy, changes in (
        ("whole", adapter, {}),
        ("adapted", adapter, {"lora": LoraConfig(rank=3)}),
        ("same", final, {"lora": LoraConfig(rank=3)}),
    ):
        settings = {"objective": "dpo", "policy": str(policy), "max_steps": 2, "output_dir": str(files / name)}
        run(make_config(**settings | changes))
        lines = [x for x in read_metrics(files / name / "metrics.jsonl") if "loss" in x]
        found[name] = [line["loss"] for line in lines]
        # The policy at the start, adapter and all, is its reference.
        assert found[name][0] == pytest.approx(0.693147, abs=1e-5)
    assert found["adapted"] == pytest.approx(found["same"], rel=1e-5)
    again = load_model(files / "adapted" / "adapter")
    torch.testing.assert_close(logits(again), logits(load_model(files / "adapted" / "final")), rtol=1e-4, atol=1e-4)
    assert fingerprint_weights(again) != fingerprint_weights(load_model(adapter))


def test_an_adapter_beside_a_pruned_policy_names_no_base(make_config, run, files):
    """Its layers are not those of the folder that the policy was pruned from."""
    config = make_config(objective="dpo", lora=LoraConfig(rank=2), student_layers=2, max_steps=1)
    run(config)
    with pytest.raises(ValueError, match="does not say which model it belongs to"):
        load_model(Path(config.output_dir) / "adapter")
