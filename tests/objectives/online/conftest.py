"""Training steps under a teacher, of models in float64."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from tvkd_fast.commands.models import of_teacher
from tvkd_fast.data import MicroBatching, TokenizedPair, build_dataset
from tvkd_fast.models import PolicyWithHead, TeacherWithHead
from tvkd_fast.scoring import OnlineScorer
from tvkd_fast.training.optim import OptimConfig, make_optimizer, set_learning_rate
from tvkd_fast.training.step import train_step


@pytest.fixture
def pairs(files: Path, chatml: Any) -> list[TokenizedPair]:
    return list(build_dataset(files / "train.jsonl", chatml, limit=4, max_length=40))


@pytest.fixture
def steps_of(pairs: list[TokenizedPair], tiny_model: Any, in_float64: Any) -> Callable[..., SimpleNamespace]:
    """Trains a policy by an objective, and returns policy, teacher, losses, and the gradients of the first step."""

    # What a family makes of its config in float32 is float64 from its first model on.
    in_float64(tiny_model(0))

    def train(
        found: Any,
        *,
        steps: int = 1,
        tokens: int = 2048,
        packing: Any = "shared",
        lr: float = 1e-2,
        clip_norm: float = 0.0,
    ) -> Any:
        policy = PolicyWithHead(in_float64(tiny_model(0)), packing=packing)
        teacher = TeacherWithHead(in_float64(tiny_model(1, hidden_size=48)), packing=packing)
        scorer = OnlineScorer(None, teacher, of_teacher=of_teacher(found.needs))
        scorer.teacher_learns = found.teacher_lora is not None
        found.attach(policy, teacher, lambda: None)
        optimizer = make_optimizer(policy, OptimConfig(lr=lr, eps=1e-3))
        set_learning_rate(optimizer, lr)
        gradients: dict[str, Tensor] = {}

        def note(*_: Any) -> None:
            gradients.update({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
            hook.remove()

        hook = optimizer.register_step_pre_hook(note)
        losses = []
        for step in range(steps):
            batches = [
                found.changed(batch, 0, step) for batch in MicroBatching(packing, tokens).batches(pairs, range(4))
            ]
            losses.append(train_step(policy, scorer, batches, optimizer, found, clip_norm=clip_norm).loss)
        return SimpleNamespace(policy=policy, teacher=teacher, losses=losses, gradients=gradients, count=len(batches))

    return train


def kl(teacher: Tensor, policy: Tensor) -> Tensor:
    """KL(q‖p) of each row of logits, summed."""
    q, p = teacher.log_softmax(-1), policy.log_softmax(-1)
    return (q.exp() * (q - p)).sum()


@pytest.fixture(scope="session")
def divergence() -> Callable[[Tensor, Tensor], Tensor]:
    return kl
