"""A model so small that every response can be enumerated."""

from itertools import product

import pytest
import torch
from transformers import LlamaConfig

from tvkd_fast.rollout import ModelSampler, SamplePrompt

STOPS = (4, 5)


@pytest.fixture
def six_words(tiny_model, in_float64):
    """A float64 model over six tokens, of which 4 and 5 end a response."""
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=list(STOPS),
    )
    return in_float64(tiny_model(seed=5, config=config)).eval()


@pytest.fixture
def tree():
    """Every response of at most `length` tokens, with its probability under a law of whole logits."""

    @torch.no_grad()
    def enumerate_all(model, prompt, length, law=lambda logps: logps):
        found = {}
        for tokens in product(range(6), repeat=length):
            end = next((i + 1 for i, token in enumerate(tokens) if token in STOPS), length)
            if tokens[:end] in found:
                continue
            ids = torch.tensor([[*prompt, *tokens[:end]]])
            logps = law(model(ids).logits[0].log_softmax(-1))
            places = torch.arange(end) + len(prompt) - 1
            found[tokens[:end]] = float(logps[places, ids[0, len(prompt) :]].sum().exp())
        assert abs(sum(found.values()) - 1) < 1e-9
        return found

    return enumerate_all


@pytest.fixture
def sampler(tiny_model):
    return ModelSampler(tiny_model(seed=3).eval(), [2])


@pytest.fixture
def prompts():
    """Prompts of several lengths."""
    draw = torch.Generator().manual_seed(0)
    return [
        SamplePrompt(torch.randint(5, 262, (length,), generator=draw).tolist(), f"row {i}")
        for i, length in enumerate((3, 11, 7, 1, 11))
    ]
