"""The start-up probe: does our head say what the model's own logits say?

Letters: T probe tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tvkd_fast.models.head import FusedLMHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 8
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@torch.no_grad()
def probe_head(model: PreTrainedModel) -> None:
    """Compare the fused head's log-probabilities with those of the model's own logits on a few tokens.

    The logits are asked for in full, [T, V] of 8 tokens, once. Raises ValueError on a mismatch: the family transforms
    its logits in a way that the config's known names do not tell.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, FusedLMHead)
    vocab = head.out_features
    ids = torch.arange(_PROBE_TOKENS, device=head.weight.device)[None] * max(1, vocab // (_PROBE_TOKENS + 1)) % vocab
    was_training = model.training
    model.eval()
    own = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    model.train(was_training)
    labels = own.argmax(-1)
    expected = own.gather(1, labels[:, None])[:, 0]
    # The likeliest token and an unlikely one: a wrong scale or cap moves both, a shift of all logits moves neither.
    unlikely = own.argmin(-1)
    got = torch.stack([head(hidden, labels), head(hidden, unlikely)])
    wanted = torch.stack([expected, own.gather(1, unlikely[:, None])[:, 0]])
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))
    if not error <= _TOLERANCES[head.weight.dtype]:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) transforms its logits in a way this library does not "
            f"know: its log-probabilities differ from the head's by {error:.1e} under {head.transforms}. Add the "
            "family to tvkd_fast/models/head.py, or train it with a trainer that keeps its logits."
        )
