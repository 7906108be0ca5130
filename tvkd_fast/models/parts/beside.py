"""What is trained beside a policy's own weights, and optimized, saved and resumed with them.

Letters: D hidden of the policy, D' of the teacher.
"""

from __future__ import annotations

import math
from hashlib import sha256

import torch
from torch import Tensor, nn

from tvkd_fast.models.lora import adapter_start, is_adapter
from tvkd_fast.models.policy import PolicyWithHead


class Beside(nn.Module):
    """Parameters that a policy holds in `beside`: no part of its model, nor of what a run leaves in `final/`.

    They have a group of their own in the optimizer, at `lr_ratio` times the policy's learning rate.
    """

    def __init__(self, lr_ratio: float) -> None:
        super().__init__()
        self.lr_ratio = lr_ratio

    def draw(self, seed: str) -> None:
        """Begin as this seed has it begin, in every process."""
        raise NotImplementedError


class Projection(Beside):
    """[D', D] W from the policy's states to the teacher's, drawn as wide as a linear layer's own."""

    def __init__(self, hidden: int, teacher_hidden: int, *, lr_ratio: float, like: Tensor) -> None:
        super().__init__(lr_ratio)
        self.weight = nn.Parameter(like.new_empty(teacher_hidden, hidden))
        self.draw("0")

    @torch.no_grad()
    def draw(self, seed: str) -> None:
        digest = sha256(f"projection:{seed}".encode()).digest()[:7]
        draw = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        bound = 1 / math.sqrt(self.weight.shape[1])
        self.weight.copy_(torch.empty(self.weight.shape).uniform_(-bound, bound, generator=draw))


class LearningAdapters(Beside):
    """The adapters that were put into another model, a teacher: its parameters by their names there."""

    def __init__(self, model: nn.Module, *, lr_ratio: float) -> None:
        super().__init__(lr_ratio)
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                # A parameter's name may have no dot, and must not be taken for an adapter of the policy's.
                self.register_parameter(name.replace(".", "/"), parameter)
        self.draw("0")

    @torch.no_grad()
    def draw(self, seed: str) -> None:
        for name, parameter in self.named_parameters():
            # A policy of the teacher's family begins elsewhere.
            parameter.copy_(adapter_start(name.replace("/", "."), parameter, f"teacher:{seed}"))


def draw_beside(policy: PolicyWithHead, seed: int) -> None:
    """Begin with all that is trained beside the policy as the run's seed draws it."""
    for module in policy.beside.values():
        assert isinstance(module, Beside)
        module.draw(str(seed))
