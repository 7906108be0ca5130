"""`patch_lm_head` on a model as it stands, and what it leaves behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Gemma2Config

from tvkd_fast.integrations import patch_lm_head, unpatch_lm_head
from tvkd_fast.ops import HeadGradient

GEMMA = Gemma2Config(
    vocab_size=262,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    final_logit_softcapping=5.0,
)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 262, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    labels[0, 7:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("config", [None, GEMMA])
def test_log_probabilities_loss_and_gradients_are_the_models_own(tiny_model: Callable[..., Any], config: Any) -> None:
    model, patched = tiny_model(0, config), patch_lm_head(tiny_model(0, config))
    inputs = batch()
    out = patched(**inputs, fused_lm_head=True)
    want = model(**inputs)
    logps = want.logits[:, :-1].log_softmax(-1)
    mask = inputs["labels"][:, 1:] != -100
    own = logps.gather(2, inputs["labels"][:, 1:].clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0)
    torch.testing.assert_close(out.log_probs, own)
    torch.testing.assert_close(out.loss, want.loss)
    out.loss.backward()
    want.loss.backward()
    for (name, p), (_, q) in zip(patched.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_sum_is_over_what_the_trainer_counts(tiny_model: Callable[..., Any]) -> None:
    model = patch_lm_head(tiny_model(0))
    whole = model(**batch(), fused_lm_head=True, num_items_in_batch=7)
    assert float(whole.loss) == pytest.approx(-float(whole.log_probs.sum()) / 7)


def test_every_other_call_is_the_models_own(tiny_model: Callable[..., Any]) -> None:
    model, patched = tiny_model(0), patch_lm_head(tiny_model(0))
    inputs = batch()
    assert torch.equal(patched(**inputs).logits, model(**inputs).logits)
    start = inputs["input_ids"][:1]
    assert torch.equal(patched.generate(start, max_new_tokens=3), model.generate(start, max_new_tokens=3))


def test_it_is_undone_whole(tiny_model: Callable[..., Any]) -> None:
    model, other = tiny_model(0), tiny_model(0)
    head, names = model.get_output_embeddings(), list(dict(model.named_parameters()))
    patch_lm_head(model)
    assert list(dict(model.named_parameters())) == names
    assert "forward" not in vars(other)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    unpatch_lm_head(model)
    assert model.get_output_embeddings() is head
    assert "forward" not in vars(model)
    # What was learned in between stays.
    assert float((head.weight - other.get_output_embeddings().weight).detach().mean()) == pytest.approx(1.0)
    assert model(**batch()).logits is not None
    with pytest.raises(ValueError, match="there is nothing to undo"):
        unpatch_lm_head(model)


def test_settings_are_taken_and_taken_anew(tiny_model: Callable[..., Any]) -> None:
    model = patch_lm_head(tiny_model(0), gradient=HeadGradient(grad_mode="sparse"))
    assert model.get_output_embeddings().gradient.grad_mode == "sparse"
    forward = vars(model)["forward"]
    assert patch_lm_head(model).get_output_embeddings().gradient.grad_mode == "exact"
    assert vars(model)["forward"] is forward
    assert "forward" not in vars(unpatch_lm_head(model))


def test_a_head_that_is_no_linear_layer_is_refused_and_stays(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(0)
    odd = torch.nn.Sequential(torch.nn.Linear(32, 262))
    model.set_output_embeddings(odd)
    with pytest.raises(ValueError, match=r"not a plain nn\.Linear"):
        patch_lm_head(model)
    assert model.get_output_embeddings() is odd
    assert "forward" not in vars(model)
