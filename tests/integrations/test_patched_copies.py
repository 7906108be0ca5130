"""Shallow copies of a patched model, and what changes of a model after it was patched."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tvkd_fast.integrations import patch_lm_head, unpatch_lm_head
from tvkd_fast.integrations.lm_head import is_patched
from tvkd_fast.models import FusedLMHead, PolicyWithHead
from tvkd_fast.ops import HeadGradient

IDS = torch.randint(1, 262, (2, 8), generator=torch.Generator().manual_seed(0))


def fused(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs.detach()
    return found


def shallow(model: Any) -> Any:
    """Modules of its own are put into the copy, as replication does, without a change of the original."""
    found = copy.copy(model)
    vars(found)["_modules"] = dict(model._modules)
    return found


def replica(model: Any) -> Any:
    return model._replicate_for_data_parallel()


def replica_within(model: Any) -> Any:
    """PEFT calls the forward of the model inside it by itself, past the hooks of a call."""
    found = replica(model)
    # Its own method, and not a call of the instance.
    vars(found)["_call_impl"] = lambda *args, **options: found.forward(*args, **options)
    return found


@pytest.mark.parametrize("duplicate", [shallow, replica, replica_within])
def test_a_shallow_copy_answers_with_its_own_weights(
    tiny_model: Callable[..., Any], duplicate: Callable[[Any], Any]
) -> None:
    model, other = patch_lm_head(tiny_model(0)).eval(), tiny_model(1).eval()
    before = fused(model)
    found = duplicate(model)
    found.model, found.lm_head = other.model, other.lm_head
    wanted = other(IDS).logits
    # The first call too, plain or fused.
    torch.testing.assert_close(found(IDS).logits, wanted)
    logps = wanted.detach()[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(fused(found), logps)
    assert torch.equal(fused(model), before)
    unpatch_lm_head(found)
    assert not is_patched(found)
    assert is_patched(model)
    torch.testing.assert_close(found(IDS).logits, wanted)
    assert torch.equal(fused(model), before)


def test_a_shallow_copy_is_fused_on_its_first_call(tiny_model: Callable[..., Any]) -> None:
    model, other = patch_lm_head(tiny_model(0)).eval(), patch_lm_head(tiny_model(1)).eval()
    found = shallow(model)
    found.model, found.lm_head = other.model, other.lm_head
    assert torch.equal(fused(found), fused(other))
    assert not torch.equal(fused(found), fused(model))


def test_nothing_is_left_behind(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(0)
    before, hooks = set(vars(model)), dict(model._forward_pre_hooks)
    unpatch_lm_head(patch_lm_head(patch_lm_head(model)))
    assert set(vars(model)) == before
    assert model._forward_pre_hooks == hooks
    assert not model._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "loss_function", lambda logits, labels, **_: logits.sum()),
        lambda model: setattr(model, "loss_type", "ForTokenClassification"),
    ],
)
@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_another_loss_after_patching_is_refused(
    tiny_model: Callable[..., Any], change: Callable[[Any], None], duplicate: Callable[[Any], Any]
) -> None:
    model = duplicate(patch_lm_head(tiny_model(0)))
    fused(model)
    change(model)
    with pytest.raises(ValueError, match=r"was given another loss .* call patch_lm_head again"):
        fused(model)
    assert model(IDS).logits is not None


def test_a_loss_of_its_own_that_is_the_same_is_taken(tiny_model: Callable[..., Any]) -> None:
    model = patch_lm_head(tiny_model(0))
    own = model.loss_function
    model.loss_function = lambda *args, **options: own(*args, **options)
    fused(patch_lm_head(model))


@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_head_that_was_fused_before_is_fused_afterwards(
    tiny_model: Callable[..., Any], duplicate: Callable[[Any], Any]
) -> None:
    policy = PolicyWithHead(tiny_model(0))
    policy.head.gradient = HeadGradient(grad_mode="sparse")
    patch_lm_head(patch_lm_head(policy.model))
    assert policy.head.gradient.grad_mode == "exact"
    model = unpatch_lm_head(duplicate(policy.model))
    assert isinstance(model.lm_head, FusedLMHead)
    assert model.lm_head.gradient.grad_mode == "sparse"
    assert not is_patched(model)


def test_a_policy_whose_head_was_taken_says_so(tiny_model: Callable[..., Any]) -> None:
    model = patch_lm_head(tiny_model(0))
    policy = PolicyWithHead(model)
    unpatch_lm_head(model)
    with pytest.raises(ValueError, match="was made a Linear after it became a PolicyWithHead: make the PolicyWithHead"):
        assert policy.vocab_size


@torch.compiler.set_stance("force_eager")
def test_a_model_unpatched_by_its_wrapper_is_pickled_without_a_forward(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(0)
    compiled: Any = torch.compile(model, backend="eager")
    unpatch_lm_head(patch_lm_head(compiled))
    other = pickle.loads(pickle.dumps(model))
    assert isinstance(other, LlamaForCausalLM)
    assert "forward" not in vars(other)
    assert type(other.lm_head) is nn.Linear
    unpatch_lm_head(model)
    assert "_tvkd_fast_patch" not in vars(model)
