"""What is trained beside a policy's own weights, and optimized, saved and resumed with them.

Letters: D hidden of the policy, D' of the teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tvkd_fast.models.lora import is_adapter


class Beside(nn.Module):
    """Parameters that a policy holds in `beside`: no part of its model, nor of what a run leaves in `final/`.

    They have a group of their own in the optimizer, at `lr_ratio` times the policy's learning rate.
    """

    def __init__(self, lr_ratio: float) -> None:
        super().__init__()
        self.lr_ratio = lr_ratio


class Projection(Beside):
    """[D', D] W from the policy's states to the teacher's, drawn from a seed that every process and run shares."""

    def __init__(self, hidden: int, teacher_hidden: int, *, lr_ratio: float, like: Tensor) -> None:
        super().__init__(lr_ratio)
        draw = torch.Generator().manual_seed(hidden)
        # As wide as a linear layer's own.
        bound = 1 / math.sqrt(hidden)
        weight = torch.empty(teacher_hidden, hidden).uniform_(-bound, bound, generator=draw)
        self.weight = nn.Parameter(weight.to(like.device, like.dtype))


class LearningAdapters(Beside):
    """The adapters that were put into another model, a teacher: its parameters by their names there."""

    def __init__(self, model: nn.Module, *, lr_ratio: float) -> None:
        super().__init__(lr_ratio)
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                # A parameter's name may have no dot, and must not be taken for an adapter of the policy's.
                self.register_parameter(name.replace(".", "/"), parameter)
