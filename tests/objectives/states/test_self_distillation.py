"""Self-distillation against its formula from whole float64 logits of every layer, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tvkd_fast.distributed import checkpoint_activations
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.parts.layer_states import with_layer_states
from tvkd_fast.objectives.states.self_distillation import SelfDistillation
from tvkd_fast.scoring import Scores


@pytest.mark.parametrize("layers", [None, [2, 1]])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_it_is_its_formula(
    layers: list[int] | None, kind: Any, tiny_model: Any, is_its_formula_from_states: Callable[..., Any]
) -> None:
    # The tied head is the embedding, whose every use has a gradient.
    found = SelfDistillation(layers=layers, kind=kind, distance_weight=0.7, likelihood_weight=0.5)
    held: list[nn.Parameter] = []

    def keep(policy: PolicyWithHead) -> None:
        held.append(policy.head.weight)

    def formula(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
        deep = ours["logps"].detach()
        of_layers = []
        for layer in [1] if layers is None else layers:
            shallow = (ours[str(layer)] @ held[0].T).log_softmax(-1)
            p, log_ratio = (deep.exp(), deep - shallow) if kind == "forward_kl" else (shallow.exp(), shallow - deep)
            of_layers.append((p * log_ratio).sum(-1).mean())
        return torch.stack(of_layers).mean()

    is_its_formula_from_states(found, formula, keep)


def test_inner_states_are_the_models_own(tiny_model: Any) -> None:
    model = tiny_model(0).eval()
    ids = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([1, 5, 9])
    call = lambda: model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # noqa: E731
    last, (second, first) = with_layer_states(model, (2, 1), call, positions)
    # transformers leaves hooks of its own behind.
    assert not any(module._forward_hooks for module in model.modules())
    wanted = model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(last, wanted[3].flatten(0, 1)[positions])
    torch.testing.assert_close(first, model.model.norm(wanted[1]).flatten(0, 1)[positions])
    torch.testing.assert_close(second, model.model.norm(wanted[2]).flatten(0, 1)[positions])


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_blocks_give_the_same_gradients(mode: Any, tiny_model: Any, batch_of: Any) -> None:
    batch, gradients = batch_of([(3, 5), (2, 2)]), []
    for recompute in ("none", mode):
        policy = PolicyWithHead(tiny_model(0), packing="shared", probe=False).train()
        checkpoint_activations(policy, recompute)
        found = SelfDistillation(layers=[1, 2], distance_weight=0.5)
        losses = found.loss(found.numbers(policy, Scores(), batch), Scores(), batch).losses
        losses.sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters()})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad)


def test_what_is_refused(tiny_model: Any) -> None:
    for layers in ([], [1, 1]):
        with pytest.raises(ValueError, match=r"layers must name inner layers, each once, got .*: set --loss.layers"):
            SelfDistillation(layers=layers)
    policy = PolicyWithHead(tiny_model(0), probe=False)
    for layer in (0, 3):
        with pytest.raises(
            ValueError, match=rf"layer {layer} is no inner one of 3: choose between 1, .* and 2, before"
        ):
            SelfDistillation(layers=[layer]).check_policy(policy)
    SelfDistillation(layers=[1, 2]).check_policy(policy)


def test_a_family_that_does_more_than_norm_is_refused(tiny_model: Any) -> None:
    model = tiny_model(0).eval()
    ids = torch.randint(3, 200, (1, 4))

    def call() -> Tensor:
        return 2 * model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    with pytest.raises(ValueError, match=r"LlamaForCausalLM does more to its last block's states than to norm them"):
        with_layer_states(model, (1,), call, torch.tensor([0]))
