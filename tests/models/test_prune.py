from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import Gemma2Config, GPT2Config, OPTConfig, SmolLM3Config

from tvkd_fast.models import PolicyWithHead, disable_dropout, fingerprint_weights, prune_layers
from tvkd_fast.models.prune import kept_layers


@given(st.integers(1, 80).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_kept_layers_are_evenly_spaced(sizes):
    total, keep = sizes
    layers = kept_layers(total, keep)
    assert len(layers) == keep == len(set(layers))
    assert layers == sorted(layers)
    assert layers[0] == 0
    if keep > 1:
        assert layers[-1] == total - 1
        gaps = [b - a for a, b in pairwise(layers)]
        assert max(gaps) - min(gaps) <= 1


def test_a_student_is_the_kept_layers_with_weights_of_its_own(tiny_model):
    teacher = tiny_model(num_hidden_layers=5)
    student = prune_layers(teacher, 3)
    assert student.config.num_hidden_layers == len(student.model.layers) == 3
    for new, old in enumerate([0, 2, 4]):
        ours, theirs = student.model.layers[new], teacher.model.layers[old]
        assert fingerprint_weights(ours) == fingerprint_weights(theirs)
        assert ours.self_attn.layer_idx == new
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert student.model.embed_tokens.weight is not teacher.model.embed_tokens.weight
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    student.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_keeping_every_layer_changes_nothing(tiny_model):
    teacher = tiny_model()
    assert fingerprint_weights(prune_layers(teacher, 3)) == fingerprint_weights(teacher)


def test_layer_types_go_with_their_layers(tiny_model):
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    teacher = tiny_model(config=config)
    student = prune_layers(teacher, 2)
    assert student.config.layer_types == [teacher.config.layer_types[0], teacher.config.layer_types[3]]


def test_rotary_choices_go_with_their_layers(tiny_model):
    config = SmolLM3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        no_rope_layers=[1, 0, 1, 0],
        pad_token_id=0,
    )
    assert prune_layers(tiny_model(config=config), 2).config.no_rope_layers == [1, 0]


def test_a_pruned_head_counts_for_the_probe_too(tiny_model):
    policy = PolicyWithHead(tiny_model(num_hidden_layers=4))
    PolicyWithHead(prune_layers(policy.model, 2))


@pytest.mark.parametrize("keep", [0, 4, -1])
def test_impossible_depths_are_refused(keep, tiny_model):
    with pytest.raises(ValueError, match=rf"cannot keep {keep} of 3 layers: choose between 1 and 3"):
        prune_layers(tiny_model(), keep)


def test_a_model_without_a_list_of_blocks_is_refused(tiny_model):
    model = tiny_model()
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="has no list of 3 blocks to prune"):
        prune_layers(model, 2)


def test_dropout_is_off_in_modules_and_attention(tiny_model):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = tiny_model(config=config).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    shape = {"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 2}
    opt = tiny_model(config=OPTConfig(**shape, num_attention_heads=4, dropout=0.5, layerdrop=0.5)).train()
    disable_dropout(opt)
    assert torch.equal(opt(ids).logits, opt(ids).logits)
    llama = tiny_model(attention_dropout=0.5).train()
    disable_dropout(llama)
    assert torch.equal(llama(ids).logits, llama(ids).logits)
