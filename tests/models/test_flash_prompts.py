"""Shared prompts through flash-attn's varlen interface, of which a plain reference stands here, against float64."""

import copy

import pytest
import torch
from draws import draws
from flash_reference import by_flash, put_in_place
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from packed_rows import FAMILIES, PAIRS, alone, close, gradients
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface, GptOssConfig
from transformers.modeling_flash_attention_utils import _lazy_define_process_function
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from tvkd_fast.data import collate_packed
from tvkd_fast.distributed.recompute import checkpoint_activations
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.probe import probe_packing, states_alone
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.models.shared_prompt import (
    FLASH,
    NAMES,
    attend,
    attend_flash,
    keep_uncompiled,
    sees,
    sequences,
    states_of,
)

CPU = torch.device("cpu")
BATCH = collate_packed(PAIRS, range(len(PAIRS)))


@pytest.fixture
def flash_attn(monkeypatch):
    return put_in_place(monkeypatch)


@pytest.mark.parametrize(
    ("family", "implementation"), [(name, FLASH[0]) for name in FAMILIES] + [("llama", FLASH[1]), ("gemma2", FLASH[1])]
)
def test_states_logps_and_gradients_are_those_of_each_response_alone(
    family, implementation, tiny_model, in_float64, flash_attn
):
    model = in_float64(tiny_model(config=copy.deepcopy(FAMILIES[family])))
    states, logps = alone(model)
    weights = torch.linspace(-1, 1, logps.numel(), dtype=torch.float64)
    (logps * weights).sum().backward()
    wanted = gradients(model)
    policy = PolicyWithHead(by_flash(model, implementation), packing="shared")
    close(policy.hidden(BATCH, BATCH.states), states, 1e-9)
    flash_attn.varlen.clear()
    got = policy(BATCH)
    assert len(flash_attn.varlen) == model.config.num_hidden_layers
    assert set(flash_attn.named) == {implementation}
    close(got, logps, 1e-9)
    (got * weights).sum().backward()
    found = gradients(policy.model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        close(gradient, wanted[name], 1e-9)


PARTS = st.lists(st.tuples(*[st.integers(0, 5)] * 3).filter(any), min_size=1, max_size=4)


@draws(120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    PARTS,
    st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    st.sampled_from([None, *range(1, 7)]),
    st.sampled_from([None, 1.5]),
)
def test_one_call_shows_each_token_its_prompt_and_itself(flash_attn, parts, heads, window, softcap):
    layout, start = [], 0
    for prompt, chosen, rejected in parts:
        border, middle = start + prompt, start + prompt + chosen
        layout.append((start, border, middle, middle + rejected))
        start = middle + rejected
    torch.manual_seed(start)
    query = torch.randn(1, heads[0], start, 8, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, heads[1], start, 8, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, heads[1], start, 6, dtype=torch.float64, requires_grad=True)
    how = {"scaling": 0.3, "softcap": softcap, "window": window}
    flash_attn.varlen.clear()
    got = attend_flash(query, key, value, layout, FLASH[0], **how)
    assert len(flash_attn.varlen) == 1
    assert all(int(flash_attn.varlen[0][name].diff().min()) > 0 for name in ("cu_seqlens_q", "cu_seqlens_k"))
    mask = create_mask(sees(layout, window, CPU), None, None, start, start, device="cpu")
    k, v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (key, value))
    scores = query @ k.transpose(2, 3) * 0.3
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    want = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    close(got, want, 1e-12)
    close(attend(query, key, value, layout, **how), want, 1e-12)
    weights = torch.randn_like(want)
    for x, y in zip(*(torch.autograd.grad((z * weights).sum(), (query, key, value)) for z in (got, want)), strict=True):
        close(x, y, 1e-12)


SEQUENCES = {
    "two pairs": (
        ((0, 3, 6, 8), (8, 10, 12, 17)),
        ([0, 6, 8, 12, 17], [0, 6, 11, 15, 22], 6, 7),
        [*range(6), 0, 1, 2, 6, 7, *range(8, 12), 8, 9, *range(12, 17)],
    ),
    "without a prompt, without responses, without a chosen one": (
        ((0, 0, 2, 4), (4, 6, 6, 6), (6, 7, 7, 9)),
        ([0, 2, 4, 6, 7, 9], [0, 2, 4, 6, 7, 10], 2, 3),
        [*range(7), 6, 7, 8],
    ),
    "nothing shared": (((0, 2, 5, 5), (5, 6, 9, 9)), ([0, 5, 9], [0, 5, 9], 5, 5), None),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_have_their_lengths_and_keys(name):
    layout, (queries, keys, longest_query, longest_key), tokens = SEQUENCES[name]
    found = sequences(layout, CPU)
    assert (found.queries.dtype, found.keys.dtype) == (torch.int32, torch.int32)
    assert (found.queries.tolist(), found.keys.tolist()) == (queries, keys)
    assert (found.longest_query, found.longest_key) == (longest_query, longest_key)
    assert (None if found.twice is None else found.twice.tokens.tolist()) == tokens


def test_layers_share_what_a_layout_says(tiny_model, flash_attn):
    policy = PolicyWithHead(by_flash(tiny_model().double()), packing="shared")
    flash_attn.varlen.clear()
    policy(BATCH)
    first, *others = flash_attn.varlen
    assert isinstance(first["max_seqlen_q"], int)
    assert isinstance(first["max_seqlen_k"], int)
    assert all(other[name] is first[name] for other in others for name in ("cu_seqlens_q", "cu_seqlens_k"))


def test_a_layout_first_met_in_inference_mode_is_learned_from_later(flash_attn):
    layout = ((0, 2, 4, 7),)
    with torch.inference_mode():
        sequences.cache_clear()
        attend_flash(*torch.randn(3, 1, 2, 7, 8, dtype=torch.float64), layout, FLASH[0])
    assert not sequences(layout, CPU).queries.is_inference()
    query = torch.randn(1, 2, 7, 8, dtype=torch.float64, requires_grad=True)
    attend_flash(query, query, query, layout, FLASH[0]).sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize("implementation", FLASH)
def test_a_call_without_a_layout_is_transformers_own(implementation, tiny_model, flash_attn):
    model = tiny_model().double()
    ids = torch.tensor([[5, 6, 7, 8], [8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    before = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    text = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    policy = PolicyWithHead(by_flash(model, implementation), packing="shared")
    assert model.config._attn_implementation == NAMES[implementation]
    close(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], before, 1e-9)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), text)
    assert flash_attn.dense
    assert set(flash_attn.named) == {implementation}
    unshared = collate_packed(PAIRS, range(len(PAIRS)), shared=False)
    close(policy(unshared), policy(BATCH), 1e-9)
    close(policy(collate_packed([], [])).sum(), torch.zeros(()), 0.0)
    # A policy of a policy's model is probed again.
    close(PolicyWithHead(model, packing="shared")(BATCH), policy(BATCH), 0.0)


def test_packing_without_sharing_is_transformers_own(tiny_model, flash_attn):
    model = tiny_model().double()
    _, logps = alone(model)
    policy = PolicyWithHead(by_flash(model), packing="unshared")
    assert model.config._attn_implementation == FLASH[0]
    close(policy(collate_packed(PAIRS, range(len(PAIRS)), shared=False)), logps, 1e-9)


@pytest.mark.parametrize("again", ["compiled around", "recomputed"])
def test_gradients_survive(again, tiny_model, flash_attn):
    policy = PolicyWithHead(by_flash(tiny_model().double()), packing="shared").train()
    policy(BATCH).sum().backward()
    wanted = gradients(policy.model)
    if again == "recomputed":
        checkpoint_activations(policy, "full")
    else:
        keep_uncompiled(policy.model)
        assert AttentionInterface()[NAMES[FLASH[0]]]._torchdynamo_disable
    policy(BATCH).sum().backward()
    found = gradients(policy.model)
    assert all(torch.equal(found[name], x) for name, x in wanted.items())


def test_weights_of_32_bits_are_computed_with_in_16(tiny_model, flash_attn):
    """Under autocast Qwen3's norms leave queries and keys in float32."""
    model = tiny_model(config=copy.deepcopy(FAMILIES["qwen3"]))
    with torch.autocast("cpu", torch.bfloat16):
        _, logps = alone(model)
    with pytest.raises(ValueError, match=r"flash_attention_2 computes in 16 bits.* autocast=torch\.bfloat16"):
        PolicyWithHead(by_flash(model), packing="shared")
    policy = PolicyWithHead(model, packing="shared", autocast=torch.bfloat16)
    close(policy(BATCH), logps, 3e-2)
    assert {call[name].dtype for call in flash_attn.varlen for name in "qkv"} == {torch.bfloat16}
    rounded = [state * 1.01 for state in states_alone(policy.model, torch.bfloat16)]
    probe_packing(policy.model, rounded, shared=True, autocast=torch.bfloat16)
    with policy.precision(required=True):
        assert policy.model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
    again = PolicyWithHead(policy.model, packing="shared", autocast=torch.bfloat16)
    assert again.required_autocast == torch.bfloat16
    assert PolicyWithHead(tiny_model(), autocast=torch.bfloat16).required_autocast is None


def test_a_config_of_weights_of_32_bits_is_refused():
    with pytest.raises(ValueError, match=r"flash_attention_2 computes in 16 bits.* set --model\.autocast bfloat16"):
        ModelConfig(attn_implementation="flash_attention_2")
    ModelConfig(attn_implementation="flash_attention_2", autocast="bfloat16")
    ModelConfig(attn_implementation="flash_attention_2", dtype="bfloat16")


@pytest.mark.parametrize("setting", ["torch", "environment"])
def test_gradients_are_summed_in_order_where_that_is_asked_for(setting, monkeypatch, flash_attn):
    inputs = torch.randn(3, 1, 2, 7, 8, dtype=torch.float64)
    attend_flash(*inputs, ((0, 2, 4, 7),), FLASH[0])
    if setting == "torch":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    attend_flash(*inputs, ((0, 2, 4, 7),), FLASH[0])
    assert [call["deterministic"] for call in flash_attn.varlen] == [False, True]


def test_sinks_are_handed_on_or_refused(monkeypatch, flash_attn):
    inputs, layout, sinks = torch.randn(3, 1, 2, 7, 8, dtype=torch.float64), ((0, 2, 4, 7),), torch.tensor([0.5, 1.0])
    with pytest.raises(ValueError, match=r"flash_attention_2 has no attention sinks.*--model\.packing padded"):
        attend_flash(*inputs, layout, FLASH[0], sinks=sinks)
    given = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, s_aux):
        given.append(s_aux)
        return q

    functions = varlen, _lazy_define_process_function(varlen)
    monkeypatch.setattr("tvkd_fast.models.shared_prompt.flash_varlen", lambda _: functions)
    attend_flash(*inputs, layout, FLASH[0], sinks=sinks)
    assert torch.equal(given[0], sinks)
    with pytest.raises(ValueError, match=r"flash_attention_2 has no sliding windows: set"):
        attend_flash(*inputs, layout, FLASH[0], window=2)


def test_sinks_are_no_part_of_the_other_calls(tiny_model):
    config = GptOssConfig(
        **{"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1},
        **{"pad_token_id": 0, "eos_token_id": 2, "attn_implementation": "eager"},
    )
    with pytest.raises(ValueError, match=r"by eager have no attention sinks.*--model\.packing padded"):
        PolicyWithHead(tiny_model(config=config), packing="shared")


def test_empty_parts_are_as_sdpa_has_them(tiny_model, flash_attn):
    layout = ((0, 0, 3, 5), (5, 7, 7, 9), (9, 11, 12, 12), (12, 13, 13, 13))
    ids = torch.arange(20, 33)[None]
    policies = [PolicyWithHead(change(tiny_model().double()), packing="shared") for change in (lambda m: m, by_flash)]
    wanted, found = (states_of(policy.model, ids, layout) for policy in policies)
    close(found, wanted, 1e-9)


HERE = {FLASH[0]: is_flash_attn_2_available, FLASH[1]: is_flash_attn_3_available}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: flash-attn runs on one alone")
@pytest.mark.parametrize("implementation", FLASH)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral, sliding"])
def test_a_gpus_kernels_are_as_right_as_sdpa(family, implementation, tiny_model):
    if not HERE[implementation]():
        pytest.skip(f"no {implementation}: pip install 'tvkd_fast[gpu]' brings flash-attn 2")
    config = copy.deepcopy(FAMILIES[family])
    config.head_dim, config.hidden_size = 16, 64
    plain = tiny_model(config=copy.deepcopy(config)).cuda()
    _, logps = alone(plain)
    logps.sum().backward()
    wanted = gradients(plain)
    errors = []
    for attention in (plain.config._attn_implementation, implementation):
        config._attn_implementation = attention
        model = tiny_model(config=copy.deepcopy(config)).to("cuda", torch.bfloat16)
        got = PolicyWithHead(model, packing="shared")(BATCH.to("cuda"))
        got.sum().backward()
        found = gradients(model)
        errors.append({name: float((x - wanted[name]).norm() / wanted[name].norm()) for name, x in found.items()})
        errors[-1]["log-probabilities"] = float((got - logps).detach().norm() / logps.detach().norm())
    assert all(error <= 2 * errors[0][name] + 1e-2 for name, error in errors[1].items())
