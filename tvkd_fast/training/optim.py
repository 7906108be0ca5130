"""AdamW and its learning rate, which is a function of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from tvkd_fast._compat import skips_on_device
from tvkd_fast.distributed import full_tensor
from tvkd_fast.models.parts.beside import Beside
from tvkd_fast.ranges import NOT_NEGATIVE, POSITIVE, SHARE, Range, at_least, check_numbers, number


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient; vectors (norms, biases) without weight decay.

    What a policy holds beside its model has a group of its own, whose `lr_ratio` multiplies the learning rate.
    """
    beside = [module for module in model.modules() if isinstance(module, Beside)]
    apart = {id(p) for module in beside for p in module.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    assert not isinstance(model, FSDPModule) or all(isinstance(p, DTensor) for p in trainable), "gathered, not shards"
    if not trainable:
        raise ValueError("the policy has no parameter that requires a gradient: nothing could be trained")
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups += [
        {"params": list(module.parameters()), "weight_decay": config.weight_decay, "lr_ratio": module.lr_ratio}
        for module in beside
    ]
    # One fused pass: on two CPU cores torch's plain loop over 71 M parameters takes a quarter of a small step.
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def clip_gradients(optimizer: torch.optim.Optimizer, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Clip the policy's gradients to a joint norm (0: to none), and those of each group beside it by themselves.

    What learns beside a policy would shorten its steps otherwise. Returns the policy's norm before, and whether all
    norms are finite, () each.
    """
    policy = [p for group in optimizer.param_groups if "lr_ratio" not in group for p in group["params"]]
    beside = [group["params"] for group in optimizer.param_groups if "lr_ratio" in group]
    most = clip_norm if clip_norm > 0 else float("inf")
    norms = [full_tensor(clip_grad_norm_(parameters, most)) for parameters in (policy, *beside)]
    finite = torch.isfinite(norms[0])
    for norm in norms[1:]:
        finite = finite & torch.isfinite(norm)
    return norms[0], finite


def update(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """`optimizer.step()` where `finite`, () bool; elsewhere weights and moments stay as they are.

    torch's fused optimizers decide it on the device; for another one the host waits.
    """
    if not skips_on_device(optimizer):
        if bool(finite):
            optimizer.step()
        return
    scaled: Any = optimizer
    scaled.found_inf, scaled.grad_scale = (~finite).to(torch.float32), None
    try:
        optimizer.step()
    finally:
        del scaled.found_inf, scaled.grad_scale


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of the next step, of each group at its ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """The rate of step `step` (from 0): linear warm-up to `lr`, then a cosine to `final_lr_ratio`·`lr` at the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - 1 - config.warmup_steps)
    lowest = config.final_lr_ratio
    return config.lr * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW, a linear warm-up and a cosine down to `final_lr_ratio`."""

    lr: float = number(1e-6, POSITIVE)
    """Peak learning rate."""
    betas: tuple[float, float] = number((0.9, 0.999), Range(0, 1, without_high=True))
    """AdamW's decay rates."""
    eps: float = number(1e-8, POSITIVE)
    """AdamW's ε."""
    weight_decay: float = number(0.0, NOT_NEGATIVE)
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    warmup_steps: int = number(0, at_least(0))
    """Steps of linear warm-up."""
    final_lr_ratio: float = number(0.1, SHARE)
    """Learning rate at the last step over the peak."""
    clip_norm: float = number(1.0, NOT_NEGATIVE)
    """Largest gradient norm, of the policy and of each thing that learns beside it by itself; 0 leaves them alone."""

    def __post_init__(self) -> None:
        check_numbers(self, "optim")
