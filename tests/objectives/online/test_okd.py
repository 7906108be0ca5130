"""OKD: the teacher's adapters learn by the divergence too, are saved and resumed, and change nothing where frozen."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from resumed import check_resumes
from torch import Tensor

from tvkd_fast.commands.prepare import prepare
from tvkd_fast.data import TokenizedPair, packed_length
from tvkd_fast.distributed import World
from tvkd_fast.models import is_adapter
from tvkd_fast.models.settings import LoraConfig
from tvkd_fast.objectives.divergences.forward_kl import ForwardKL
from tvkd_fast.objectives.online.okd import OKD

pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
def test_with_frozen_adapters_it_is_the_divergence(steps_of: Callable[..., SimpleNamespace], clip_norm: float) -> None:
    found = steps_of(OKD(teacher_lr_ratio=0.0, responses="both"), steps=3, clip_norm=clip_norm)
    plain = steps_of(ForwardKL(responses="both"), steps=3, clip_norm=clip_norm)
    torch.testing.assert_close(found.losses, plain.losses, rtol=1e-12, atol=1e-14)
    for name, parameter in plain.policy.named_parameters():
        torch.testing.assert_close(found.policy.get_parameter(name), parameter, rtol=1e-9, atol=1e-12)
    learning = steps_of(OKD(responses="both"), steps=3, clip_norm=clip_norm)
    assert learning.losses[0] == found.losses[0]
    # Both sides move towards each other.
    assert learning.losses[2] < found.losses[2]


@pytest.mark.parametrize("count", [1, 4])
def test_loss_and_all_gradients_are_those_of_whole_logits(
    count: int,
    pairs: list[TokenizedPair],
    steps_of: Callable[..., SimpleNamespace],
    divergence: Callable[[Tensor, Tensor], Tensor],
) -> None:
    tokens = 2048 if count == 1 else max(packed_length(pair) for pair in pairs)
    # A rate of 0 leaves the weights, by which the gradients are looked at.
    found = steps_of(OKD(teacher_rank=2, responses="both"), tokens=tokens, lr=1e-12)
    assert found.count == count
    total, number = torch.zeros((), dtype=torch.float64), 0
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + response])
            predicting = slice(len(pair.prompt_ids) - 1, -1)
            logits = [
                m.model(input_ids=ids, use_cache=False).logits[0, predicting] for m in (found.teacher, found.policy)
            ]
            total = total + divergence(*logits)
            number += len(response)
    wanted = total / number
    torch.testing.assert_close(found.losses[0], wanted.detach(), rtol=1e-8, atol=1e-12)
    named = dict(found.policy.named_parameters())
    gradients = torch.autograd.grad(wanted, list(named.values()))
    assert any("beside" in name and grad.abs().max() > 1e-6 for name, grad in zip(named, gradients, strict=True))
    for name, grad in zip(named, gradients, strict=True):
        torch.testing.assert_close(found.gradients[name], grad, rtol=1e-6, atol=1e-9)


def test_a_run_resumes_bit_for_bit_with_the_teachers_adapters(make_config: Any, run: Any, files: Path) -> None:
    check_resumes(make_config, run, files, objective="okd")


def test_seed_and_owner_decide_where_adapters_begin(make_config: Any) -> None:
    def of_seed(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        lora = LoraConfig(rank=8)
        config = make_config(objective="okd", seed=seed, lora=lora, teacher=make_config().policy, data_eval=None)
        policy = prepare(config, World(torch.device("cpu")), verbose=False).policy
        named = dict(policy.named_parameters())
        own = {name: x.detach() for name, x in named.items() if is_adapter(name) and "lora_A" in name}
        beside = {name.replace("/", "."): x.detach() for name, x in named.items() if "/lora_A/" in name}
        return own, {name.removeprefix("beside.teacher."): x for name, x in beside.items()}

    (own, teachers), (again, teachers_again), (other, teachers_other) = map(of_seed, (3, 3, 4))
    assert own.keys() == teachers.keys()
    assert own
    for name, adapter in own.items():
        assert torch.equal(adapter, again[name])
        assert torch.equal(teachers[name], teachers_again[name])
        found = (adapter, other[name], teachers[name], teachers_other[name])
        assert len({tuple(x.flatten().tolist()) for x in found}) == 4


def test_what_is_refused(make_config: Any, run: Any) -> None:
    for name in ("scores", "eval_scores"):
        with pytest.raises(ValueError, match=rf"okd trains adapters in the teacher, .*: leave --{name} out, and set"):
            run(make_config(objective="okd", **{name: "scores"}))
    with pytest.raises(ValueError, match=r"okd trains weights beside the policy's, .*: set --nproc 1, or"):
        run(make_config(objective="okd", nproc=2))
    with pytest.raises(ValueError, match=r"okd needs a teacher: set --teacher"):
        run(make_config(objective="okd", teacher=None))
