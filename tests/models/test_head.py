from types import SimpleNamespace

import pytest
import torch
from packed_rows import GROUPED, HEADED, SHAPE
from torch import nn
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
)

from tvkd_fast.data import collate_pairs
from tvkd_fast.data.tokenization import TokenizedPair
from tvkd_fast.distributed import World
from tvkd_fast.models import FusedLMHead, HeadTransforms, PolicyWithHead, TeacherWithHead, head_transforms, probe_head
from tvkd_fast.models.lent import adapters_off
from tvkd_fast.ops import linear_lse
from tvkd_fast.scoring import OnlineScorer

FAMILIES = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**HEADED),
    "mistral": MistralConfig(**GROUPED),
    "gemma2": Gemma2Config(**HEADED, final_logit_softcapping=3.0, attn_implementation="eager"),
    "gemma3": Gemma3TextConfig(**HEADED, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.25),
    "granite": GraniteConfig(**GROUPED, logits_scaling=4.0),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "olmo": OlmoConfig(**GROUPED),
}


@pytest.fixture
def batch():
    pairs = [
        TokenizedPair([5, 6, 7], [8, 9, 2], [10, 2], True, True, "row 0"),
        TokenizedPair([11, 12], [13, 2], [14, 15, 16, 17, 2], True, True, "row 1"),
    ]
    return collate_pairs(pairs, [0, 1])


def twin_logps(model, batch):
    """Return log-probabilities from the model's own logits, row by row and without padding."""
    logps = []
    for row in range(batch.input_ids.shape[0]):
        lengths = batch.cu_seqlens.diff()
        width = batch.input_ids.shape[1]
        first = int(batch.predicting[batch.cu_seqlens[row]]) - row * width
        end = first + 1 + int(lengths[row])
        ids = batch.input_ids[row : row + 1, :end]
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
        logps.append(logits[first : end - 1].log_softmax(-1).gather(1, ids[0, first + 1 :, None])[:, 0])
    return torch.cat(logps)


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_and_gradients_are_the_models_own(family, tiny_model, batch):
    model = tiny_model(config=FAMILIES[family])
    expected = twin_logps(model, batch)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64)
    (expected * weights).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    policy = PolicyWithHead(model)
    got = policy(batch)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    (got * weights.float()).sum().backward()
    for name, parameter in policy.model.named_parameters():
        scale = max(1.0, float(wanted[name].abs().max()))
        assert float((parameter.grad - wanted[name]).abs().max()) <= 2e-4 * scale, name


@pytest.mark.parametrize("kappa", [1.0, 0.7])
def test_a_teacher_gives_both_sums_of_every_state(kappa, tiny_model, batch):
    teacher = TeacherWithHead(tiny_model(config=FAMILIES["gemma2"]), kappa=kappa)
    lse, lse_kappa = teacher(batch)
    assert lse.shape == lse_kappa.shape == (batch.labels.numel() + 4,)
    row, position = divmod(int(batch.states[0]), batch.input_ids.shape[1])
    logits = teacher.model(input_ids=batch.input_ids[row : row + 1, : position + 1]).logits[0, -1].double()
    torch.testing.assert_close(lse[0].double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse_kappa[0].double(), (kappa * logits).logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert not lse.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_keeps_the_very_parameters(tied, tiny_model):
    model = tiny_model(tie_word_embeddings=tied)
    weight = model.get_output_embeddings().weight
    policy = PolicyWithHead(model)
    assert policy.head.weight is weight
    assert (policy.head.weight is model.get_input_embeddings().weight) is tied


def test_the_head_still_gives_logits_and_the_model_still_generates(tiny_model):
    model = tiny_model(config=FAMILIES["cohere"])
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    PolicyWithHead(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_the_head_answers_with_the_sums_that_the_op_gives(tiny_model):
    head = FusedLMHead.from_linear(tiny_model().get_output_embeddings(), HeadTransforms(2.0, 0.5))
    hidden = torch.randn(5, 32)
    got, wanted = head(hidden, kappa=0.7), linear_lse(hidden, head.weight, softcap=2.0, logit_scale=0.5, kappa=0.7)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


class ScaledLlama(LlamaForCausalLM):
    """A family that scales its logits without saying so in its config."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.3
        return out


def test_a_gathered_head_is_where_the_states_are(tiny_model):
    frozen = TeacherWithHead(tiny_model())
    assert frozen.head.gathered().weight.data_ptr() == frozen.head.weight.data_ptr()
    elsewhere = World(torch.device("meta"))
    scorer = OnlineScorer(frozen, frozen, None, elsewhere, of_teacher=["states"], reference_states=True, base=frozen)
    for head in (scorer.teacher_head, scorer.ref_head, scorer.base_head):
        assert head.weight.is_meta
        assert head.weight.shape == frozen.head.weight.shape


def test_the_probe_refuses_a_transform_it_does_not_know():
    with pytest.raises(ValueError, match=r"ScaledLlama \(llama\) transforms its logits in a way this library does not"):
        PolicyWithHead(ScaledLlama(FAMILIES["llama"]))


def test_the_probe_refuses_a_transform_left_out(tiny_model):
    model = tiny_model(config=FAMILIES["granite"])
    model.set_output_embeddings(FusedLMHead.from_linear(model.get_output_embeddings(), HeadTransforms()))
    with pytest.raises(ValueError, match="log-probabilities differ from the head's"):
        probe_head(model)


def test_a_head_that_is_no_plain_linear_is_refused(tiny_model):
    class LoraLinear(nn.Linear):
        pass

    model = tiny_model()
    model.set_output_embeddings(LoraLinear(32, 262))
    with pytest.raises(ValueError, match=r"the head is a LoraLinear, not a plain nn.Linear: merge a LoRA adapter"):
        PolicyWithHead(model)


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("falcon_h1", {"lm_head_multiplier": 0.5}, HeadTransforms(None, 0.5)),
        ("hyperclovax", {"logits_scaling": 0.125}, HeadTransforms(None, 0.125)),
        ("granitemoe", {"logits_scaling": 8.0}, HeadTransforms(None, 0.125)),
        ("cohere2", {"logit_scale": 0.25}, HeadTransforms(None, 0.25)),
        ("recurrent_gemma", {"logits_soft_cap": 30.0}, HeadTransforms(30.0, 1.0)),
        ("xlstm", {"output_logit_soft_cap": 30.0}, HeadTransforms(30.0, 1.0)),
        ("gemma2", {"final_logit_softcapping": None}, HeadTransforms(None, 1.0)),
        ("clip", {"logit_scale": 9.0}, HeadTransforms(None, 1.0)),
    ],
)
def test_families_name_their_transforms_differently(model_type, fields, expected):
    text = SimpleNamespace(model_type=model_type, **fields)
    assert head_transforms(SimpleNamespace(get_text_config=lambda: text)) == expected


def test_a_refused_head_is_named_with_its_remedy(tiny_model):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")
    model = tiny_model()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head of LlamaForCausalLM: the head is a Linear, .* merge a LoRA"):
        PolicyWithHead(model)
    model = tiny_model()
    model.set_output_embeddings(nn.Sequential(nn.Linear(32, 262)))
    with pytest.raises(ValueError, match=r"lm_head of LlamaForCausalLM: the head is a Sequential, .*set_output_em"):
        PolicyWithHead(model)
    Linear4bit = type("Linear4bit", (nn.Linear,), {})
    model.set_output_embeddings(Linear4bit(32, 262))
    with pytest.raises(ValueError, match=r"lm_head of LlamaForCausalLM: the head is a Linear4bit, .*load the head un"):
        PolicyWithHead(model)


def test_a_head_that_peft_trains_a_copy_of(tiny_model, batch):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")
    model = tiny_model(0).eval()
    wanted = PolicyWithHead(model)(batch).detach()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    policy = PolicyWithHead(model)
    with torch.no_grad():
        policy.head.weight.mul_(2.0)
    found = policy(batch).detach()
    assert not torch.allclose(found, wanted)
    with adapters_off(model):
        torch.testing.assert_close(policy(batch).detach(), wanted)
    assert torch.equal(policy(batch).detach(), found)


def test_a_forward_that_brings_mixed_precision_is_probed_in_it(tiny_model):
    model = tiny_model(0)
    own = model.forward
    model.forward = lambda *args, **options: torch.autocast("cpu", torch.bfloat16)(own)(*args, **options)
    probe_head(PolicyWithHead(model).model)
    model.lm_head.register_forward_hook(lambda _head, _args, logits: logits * 1.1)
    with pytest.raises(ValueError, match="transforms its logits in a way this library does not"):
        PolicyWithHead(model)
