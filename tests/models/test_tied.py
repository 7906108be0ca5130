"""A head of its own under a config that ties it to the embedding keeps its numbers wherever it goes."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tvkd_fast.models import empty_model, fingerprint_weights, load_model, prune_layers, save_model

IDS = torch.arange(12)[None]


@pytest.fixture
def untied(tiny_model):
    model = tiny_model(3)
    assert model.config.tie_word_embeddings
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2 + 0.1)
    return model.eval()


@pytest.fixture
def folder(untied, chatml, tmp_path):
    untied.save_pretrained(tmp_path / "model")
    chatml.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def answers(model):
    return model(IDS).logits


def test_it_is_loaded_and_saved_as_it_is(folder, untied, tmp_path):
    loaded = load_model(folder)
    assert not loaded.config.tie_word_embeddings
    save_model(loaded, None, tmp_path / "again")
    for model in (loaded, load_model(tmp_path / "again"), AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        torch.testing.assert_close(answers(model), answers(untied))
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_a_model_that_was_untied_in_memory_is_saved_untied(untied, tmp_path):
    save_model(untied, None, tmp_path)
    assert not AutoModelForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings
    torch.testing.assert_close(answers(load_model(tmp_path)), answers(untied))


def test_a_student_keeps_both(folder, untied):
    student = prune_layers(load_model(folder), 2)
    assert torch.equal(student.get_output_embeddings().weight, untied.lm_head.weight)
    assert torch.equal(student.get_input_embeddings().weight, untied.get_input_embeddings().weight)


def test_it_is_not_filled_piece_by_piece_by_one_of_the_two(folder, untied, tiny_model, tmp_path):
    assert empty_model(folder) is None
    # Files that hold one weight under both names are as good as those that hold it once.
    tied = tiny_model(3)
    whole = {name: x.clone() for name, x in tied.state_dict().items()}
    tied.save_pretrained(tmp_path / "twice")
    save_file(whole, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    found = empty_model(tmp_path / "twice")
    assert found is not None
    assert fingerprint_weights(load_model(tmp_path / "twice")) == fingerprint_weights(tied)
