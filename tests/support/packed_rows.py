"""What packed rows are compared with: tiny models of many families, and every response in a call of its own."""

import torch
from transformers import (
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from tvkd_fast.data.tokenization import TokenizedPair

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
HEADED = GROUPED | {"head_dim": 8}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2, sliding": Qwen2Config(**GROUPED, **SLIDING, use_sliding_window=True),
    "qwen3": Qwen3Config(**HEADED),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "mistral, sliding": MistralConfig(**GROUPED, sliding_window=3),
    # transformers 5.17 would choose sdpa, which has no softcap.
    "gemma2": Gemma2Config(
        **HEADED, **SLIDING, final_logit_softcapping=3.0, attn_logit_softcapping=2.0, attn_implementation="eager"
    ),
    "gemma3": Gemma3TextConfig(**HEADED, **SLIDING),
    "phi3": Phi3Config(**GROUPED),
    "phi3, sliding": Phi3Config(**GROUPED, sliding_window=3),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "olmo": OlmoConfig(**GROUPED),
    "olmo2": Olmo2Config(**GROUPED),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.25),
    "cohere2, sliding": Cohere2Config(**GROUPED, **SLIDING),
    "gpt2": GPT2Config(
        vocab_size=101,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    ),
}
PAIRS = [
    TokenizedPair([5, 6, 7], [8, 9, 2], [10, 2], True, True, "row 0"),
    TokenizedPair([11, 12], [13, 2], [14, 15, 16, 17, 2], True, True, "row 1"),
    TokenizedPair([21], [22, 23, 24, 25, 26], [27], False, True, "row 2"),
    TokenizedPair([31, 32, 33, 34, 35, 36, 37], [38, 39], [40, 41, 42], True, False, "row 3"),
]


def every_response():
    return [(p.prompt_ids, p.chosen_ids) for p in PAIRS] + [(p.prompt_ids, p.rejected_ids) for p in PAIRS]


def alone(model):
    """(M, D) states and (N,) log-probabilities of every response, each from a call that holds nothing else."""
    states, logps = [], []
    for prompt, response in every_response():
        ids = torch.tensor([prompt + response], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        states.append(hidden[len(prompt) - 1 :])
        logps.append(logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(states), torch.cat(logps)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@torch.no_grad()
def close(got, want, tolerance):
    assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))
