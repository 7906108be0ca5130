"""Adapters that peft saved, given where a model is: merged as they are loaded, or refused."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tvkd_fast.models import (
    empty_model,
    fingerprint_model,
    fingerprint_weights,
    load_model,
    load_stop_ids,
    load_tokenizer,
    model_shape,
    save_model,
)

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")


@pytest.fixture
def make_adapter(model_folder, tmp_path):
    """An adapter's folder, and the base with the adapter beside it."""
    base = model_folder(seed=5)

    def make(name="adapter", seed=0, **changes):
        config = peft.LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | changes)
        both = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, x in both.named_parameters():
                if ".lora_" in key or "modules_to_save" in key:
                    x.normal_(0, 0.3)
        both.save_pretrained(tmp_path / name)
        return tmp_path / name, both.eval()

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        # Of a tied model, whose embedding stays as it is.
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_is_merged_into_its_base(changes, make_adapter):
    folder, both = make_adapter(**changes)
    model, ids = load_model(folder), torch.arange(12)[None]
    save_model(model, None, folder.with_name("saved"))
    with torch.no_grad():
        for merged in (model, load_model(folder.with_name("saved"))):
            torch.testing.assert_close(merged(ids).logits, both(ids).logits, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(p.requires_grad for p in model.parameters())
    # An adapter that is put beside it must not say that it belongs to the base.
    assert model.name_or_path == str(folder)


def test_two_of_one_base_are_two_models(make_adapter, model_folder):
    found = {fingerprint_model(load_model(make_adapter(str(seed), seed)[0])) for seed in (0, 1)}
    assert len(found | {fingerprint_model(load_model(model_folder(seed=5)))}) == 3


def test_its_tokenizer_and_its_shape_are_its_bases(make_adapter, model_folder):
    folder, _ = make_adapter()
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(model_folder(seed=5)).get_vocab()
    assert model_shape(str(folder)).layers == 3
    assert empty_model(folder) is None


@pytest.mark.parametrize("ignores", [False, True], ids=["as it is", "as transformers 5.17"])
def test_a_folder_with_both_is_base_and_adapter(make_adapter, model_folder, tmp_path, monkeypatch, ignores):
    if ignores:
        monkeypatch.setattr("tvkd_fast.models.load.ignores_adapter_subfolder", lambda *_: True)
    folder, _ = make_adapter()
    both = tmp_path / "both"
    shutil.copytree(model_folder(seed=5), both)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, both)
    loaded = load_model(both)
    assert fingerprint_weights(loaded) == fingerprint_weights(load_model(folder))
    assert loaded.name_or_path == str(both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": None}, "does not say which model it belongs to"),
        ({"base_model_name_or_path": "/nowhere/model"}, "no model at /nowhere/model"),
        ({"base_model_name_or_path": "shallower"}, r"layers that do not exist, such as .*layers\.2"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "Found missing adapter keys"),
        ({"peft_type": "PREFIX_TUNING"}, "learns tokens and no weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_what_would_be_left_out_is_refused(change, message, make_adapter, model_folder):
    folder, _ = make_adapter()
    if change.get("base_model_name_or_path") == "shallower":
        change = {"base_model_name_or_path": model_folder(seed=5, num_hidden_layers=2)}
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_vocabulary_it_was_trained_with_is_its_own(tied, model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder(seed=5, tie_word_embeddings=tied))
    base.resize_token_embeddings(265, mean_resizing=False)
    torch.manual_seed(0)
    with torch.no_grad():
        base.get_input_embeddings().weight[262:].normal_()
        base.get_output_embeddings().weight[262:].normal_()
    both = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    both.save_pretrained(tmp_path / "adapter")
    model, ids = load_model(tmp_path / "adapter"), torch.tensor([[1, 264, 3]])
    save_model(model, None, tmp_path / "saved")
    with torch.no_grad():
        for merged in (model, load_model(tmp_path / "saved")):
            torch.testing.assert_close(merged(ids).logits, both(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config.vocab_size == model_shape(str(tmp_path / "adapter")).vocab == 265


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_new_tokens_without_a_head_are_refused(model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder(seed=5, tie_word_embeddings=False))
    base.resize_token_embeddings(265, mean_resizing=False)
    both = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    both.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if "lm_head" not in name}, file)
    with pytest.raises(ValueError, match="vocabulary of 265 tokens, and holds no embedding or no head of the new"):
        load_model(tmp_path / "adapter")


def test_a_base_that_is_an_adapter_is_merged_first(make_adapter, tmp_path):
    first, _ = make_adapter("first", seed=1)
    both = peft.get_peft_model(load_model(first), peft.LoraConfig(r=2, target_modules=["k_proj"])).eval()
    with torch.no_grad():
        for name, x in both.named_parameters():
            if ".lora_" in name:
                x.normal_(0, 0.3)
    both.save_pretrained(tmp_path / "second")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "second")(ids).logits, both(ids).logits, rtol=1e-4, atol=1e-4)
    config = json.loads((first / "adapter_config.json").read_text())
    for base in (str(first), str(tmp_path / "second")):
        (first / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=r"first has itself as its base: write the model"):
            load_model(first)


def test_an_adapter_in_a_folder_of_its_name_is_named(model_folder, tmp_path):
    both = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder(seed=5)),
        peft.LoraConfig(r=2, target_modules=["q_proj"]),
        "mine",
    )
    both.save_pretrained(tmp_path / "adapter")
    for load in (load_model, load_tokenizer, lambda path: model_shape(str(path))):
        with pytest.raises(ValueError, match=f"is no adapter, but holds some .*: give {tmp_path / 'adapter' / 'mine'}"):
            load(tmp_path / "adapter")
    assert load_model(tmp_path / "adapter" / "mine")


def test_merging_warns_of_nothing(make_adapter):
    folder, _ = make_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder)


def test_pickled_weights_are_refused(make_adapter):
    folder, _ = make_adapter()
    Path(folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors: save the adapter again"):
        load_model(folder)


def test_it_ends_where_its_base_does(make_adapter):
    folder, both = make_adapter()
    base = both.get_base_model().config._name_or_path
    assert load_stop_ids(folder) == load_stop_ids(base) != frozenset()
