"""Packed rows against every response in a call of its own, without padding: states, log-probabilities, gradients."""

import copy
import json

import pytest
import torch
from packed_rows import FAMILIES, PAIRS, alone, close, gradients
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

from tvkd_fast._compat import recompute_blocks
from tvkd_fast.data import collate_packed, collate_pairs
from tvkd_fast.data.tokenization import TokenizedPair
from tvkd_fast.models import PolicyWithHead, TeacherWithHead, load_model
from tvkd_fast.models.shared_prompt import attend, block_mask, sees, states_of


@pytest.mark.parametrize("packing", ["shared", "unshared"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_logps_and_gradients_are_those_of_each_response_alone(
    family, dtype, tolerance, packing, tiny_model, in_float64
):
    model = tiny_model(config=copy.deepcopy(FAMILIES[family]))
    if dtype == torch.float64:
        model = in_float64(model)
    states, logps = alone(model)
    weights = torch.linspace(-1, 1, logps.numel(), dtype=dtype)
    (logps * weights).sum().backward()
    wanted = gradients(model)
    policy = PolicyWithHead(model, packing=packing)
    batch = collate_packed(PAIRS, range(len(PAIRS)), shared=packing == "shared")
    close(policy.hidden(batch, batch.states), states, tolerance)
    got = policy(batch)
    close(got, logps, tolerance)
    (got * weights).sum().backward()
    found = gradients(policy.model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        close(gradient, wanted[name], tolerance)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_flex_attentions_mask_shows_what_the_calls_a_pair_show(shared, window):
    layout = collate_packed(PAIRS, range(len(PAIRS)), shared=shared).layout
    length = layout[-1][3]
    torch.manual_seed(0)
    query = torch.randn(1, 4, length, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 4, length, 8, dtype=torch.float64)
    mask = create_mask(sees(layout, window, query.device), None, None, length, length, device="cpu")
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    close(attend(query, key, value, layout, scaling=0.3, window=window), dense.transpose(1, 2), 1e-12)
    blocks = block_mask(layout, window, query.device)
    close(flex_attention(query, key, value, block_mask=blocks, scale=0.3), dense, 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: FlexAttention has no backward elsewhere")
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral, sliding"])
def test_flex_attention_shares_prompts_on_a_gpu(family, tiny_model):
    config = copy.deepcopy(FAMILIES[family])
    config.head_dim, config.hidden_size = 16, 64
    config._attn_implementation = "flex_attention"
    model = tiny_model(config=config).cuda()
    _, logps = alone(model)
    policy = PolicyWithHead(model, packing="shared")
    close(policy(collate_packed(PAIRS, range(len(PAIRS))).to("cuda")), logps, 1e-4)


def test_eager_attention_shares_prompts_as_sdpa_does(tiny_model):
    config = copy.deepcopy(FAMILIES["llama"])
    config._attn_implementation = "eager"
    model = tiny_model(config=config)
    _, logps = alone(model)
    close(PolicyWithHead(model, packing="shared")(collate_packed(PAIRS, range(len(PAIRS)))), logps, 1e-5)


def test_a_teacher_says_the_same_of_packed_rows(tiny_model):
    model = tiny_model(config=copy.deepcopy(FAMILIES["gemma2"]))
    teacher = TeacherWithHead(model, kappa=0.7, packing="shared")
    for packed, padded in zip(
        teacher(collate_packed(PAIRS, range(len(PAIRS)))), teacher(collate_pairs(PAIRS, range(len(PAIRS)))), strict=True
    ):
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


def test_gradients_survive_activation_checkpointing(tiny_model):
    policy = PolicyWithHead(tiny_model(), packing="shared").train()
    batch = collate_packed(PAIRS, range(len(PAIRS)))
    policy(batch).sum().backward()
    wanted = gradients(policy.model)
    recompute_blocks(policy.model, {})
    policy(batch).sum().backward()
    found = gradients(policy.model)
    assert all(torch.allclose(found[name], x, atol=1e-6) for name, x in wanted.items())


def test_a_copy_shares_prompts_too(tiny_model):
    policy = PolicyWithHead(tiny_model(), packing="shared")
    batch = collate_packed(PAIRS, range(len(PAIRS)))
    assert torch.equal(copy.deepcopy(policy)(batch), policy(batch))


def test_the_saved_model_is_an_ordinary_one(tiny_model, tmp_path):
    policy = PolicyWithHead(tiny_model(), packing="shared")
    policy.model.save_pretrained(tmp_path)
    assert "tvkd" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_a_model_that_shares_prompts_still_generates_and_pads(tiny_model):
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    before = model(input_ids=ids, attention_mask=mask).logits
    text = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    PolicyWithHead(model, packing="shared")
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), text)


STRANGERS = {
    "state-space": (MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4), "shared"),
    "state-space, unshared": (MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2), "unshared"),
    "ALiBi": (BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4), "shared"),
    "ALiBi, unshared": (BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4), "unshared"),
}


@pytest.mark.parametrize("family", STRANGERS)
def test_families_that_packed_rows_would_change_are_refused(family, tiny_model):
    config, packing = STRANGERS[family]
    with pytest.raises(ValueError, match=r"set --model\.packing"):
        PolicyWithHead(tiny_model(config=copy.deepcopy(config)), packing=packing)
    PolicyWithHead(tiny_model(config=copy.deepcopy(config)))


def test_other_attention_is_refused_with_the_remedy(tiny_model):
    model = tiny_model().bfloat16()
    model.config._attn_implementation_internal = "flash_attention_4"
    with pytest.raises(ValueError, match=r"need sdpa, .* or flash_attention_3, .* with flash_attention_4: set --model"):
        PolicyWithHead(model, packing="shared", probe=False)


def test_layers_of_another_kind_are_refused_by_name(tiny_model):
    model = tiny_model()
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has layers of chunked_attention, .*packing unshared"):
        PolicyWithHead(model, packing="shared", probe=False)


def test_a_window_that_is_kept_from_the_attention_is_refused(tiny_model):
    model = tiny_model()
    model.config.layer_types = ["sliding_attention"] * 3
    with pytest.raises(ValueError, match="keeps its sliding window from its attention"):
        PolicyWithHead(model, packing="shared")


def test_shared_rows_need_a_model_that_was_made_for_them(tiny_model):
    policy = PolicyWithHead(tiny_model())
    with pytest.raises(ValueError, match=r"shares prompts and the model was not made to: PolicyWithHead\(packing="):
        policy(collate_packed(PAIRS, range(len(PAIRS))))
    unshared = collate_packed(PAIRS, range(len(PAIRS)), shared=False)
    padded = collate_pairs(PAIRS, range(len(PAIRS)))
    torch.testing.assert_close(policy(unshared), policy(padded), rtol=1e-5, atol=1e-5)


def test_no_mask_is_as_large_as_the_row(tiny_model, kit):
    policy = PolicyWithHead(tiny_model(), packing="shared")
    pairs = [TokenizedPair([5] * 20, [6] * 20, [7] * 20, True, True, f"row {i}") for i in range(40)]
    batch = collate_packed(pairs, range(40))
    with kit.Watch() as found, torch.no_grad():
        states_of(policy.model, batch.input_ids, batch.layout)
    assert found.largest < batch.num_tokens**2 // 4


@pytest.mark.slow
def test_a_trained_model_of_thirty_layers_is_let_through():
    try:
        model = load_model("smollm2-135m")
    except ValueError as missing:
        pytest.skip(f"no packaged model: {missing}")
    policy = PolicyWithHead(model, packing="shared").eval()
    packed, padded = collate_packed(PAIRS, range(len(PAIRS))), collate_pairs(PAIRS, range(len(PAIRS)))
    with torch.no_grad():
        torch.testing.assert_close(policy(packed), policy(padded), rtol=1e-3, atol=1e-3)
