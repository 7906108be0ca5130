"""The heads of TVKDTrainer's policy and reference, this library's or TRL's, and their calls by TRL's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from inspect import getclosurevars
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from tvkd_fast.integrations.answer import FusedLMOutput, HeadSettings
from tvkd_fast.integrations.lm_head import LentHead, patch_lm_head
from tvkd_fast.integrations.patched import model_inside, patch_of, unwrapped
from tvkd_fast.integrations.trl_config import TVKDConfig
from tvkd_fast.models.lent import adapters_off, moves_with, on_base_of
from tvkd_fast.ops import HeadGradient, HeadStats
from tvkd_fast.ops.known import Derivative

LEFT_OUT = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
"""TRL's metrics of whole rows of the vocabulary, which this library's head does not compute."""


@dataclass
class TRLOutput(FusedLMOutput):
    """An answer with zeros where TRL reads more than log-probabilities; its metrics of those are left out."""

    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None

    def __post_init__(self) -> None:
        if self.log_probs is not None and self.label_mask is not None:
            self.entropy = self.mean_logits = torch.zeros_like(self.log_probs)
            self.is_top1 = torch.zeros_like(self.label_mask)
        super().__post_init__()


class TrainerHeads:
    """The heads of a trainer's policy and reference."""

    def __init__(self, args: TVKDConfig) -> None:
        self.ours = args.fused_head != "trl" and (args.fused_head != "auto" or args.device.type == "cpu")
        self.stats = HeadStats() if self.ours and args.grad_mode != "exact" else None
        gradient = HeadGradient(grad_mode=args.grad_mode, eps=args.eps)
        self._settings = HeadSettings(gradient, self.stats, TRLOutput)
        self._taken = False
        self._lent: LentHead | None = None

    def take(self, trainer: Any) -> None:
        """Check the reference, and put this library's head into the policy where it is missing or changed.

        Called before any model is, so that a policy that was unpatched or patched anew in between is patched again.
        """
        policy, reference = trainer.model, trainer.ref_model
        if not self._taken:
            self._take_first(trainer, policy, reference)
            self._taken = True
        if self.ours:
            patch = patch_of(model_inside(policy))
            if patch is None or patch.settings != self._settings:
                patch_lm_head(policy, gradient=self._settings.gradient, stats=self.stats, output=TRLOutput)

    def _take_first(self, trainer: Any, policy: nn.Module, reference: nn.Module | None) -> None:
        if self.ours:
            _check_trainer(trainer)
            without_trls_head(policy)
        if reference is None:
            return
        check_reference(reference, policy)
        own_base = any(module is model_inside(policy) for module in reference.modules())
        if self.ours:
            without_trls_head(reference)
            if not own_base:
                self._lent = LentHead(reference, HeadSettings(HeadGradient(), None, TRLOutput))
        elif own_base:
            raise ValueError(
                "ref_model is the policy's own base, which TRL's head answers for once: leave ref_model out, or set "
                "fused_head='tvkd'"
            )

    @contextmanager
    def asked(self, reference: nn.Module | None, policy: nn.Module) -> Iterator[None]:
        """Let the reference answer while the block lasts: with this library's head, and without the policy's adapters
        where it is the base that they are on."""
        with ExitStack() as stack:
            if reference is not None and on_base_of(reference, policy):
                stack.enter_context(adapters_off(reference))
            if reference is not None and self._lent is not None:
                stack.enter_context(self._lent.asked(reference))
            yield


class HeardModel:
    """A model that is called, and the sums of the log-probabilities that it answered with.

    With `derivative`, the loss's by those sums, this library's head makes its gradient as it answers; with `collisions`
    it answers with log Σp² too.
    """

    def __init__(self, model: Any, derivative: Derivative | None = None, *, collisions: bool = False) -> None:
        self._model = model
        self._more: dict[str, Any] = {} if derivative is None else {"derivative": derivative}
        if collisions:
            self._more["collisions"] = True
        self.logps: Tensor
        self.log_collisions: Tensor | None = None
        self.aux_loss: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        out = self._model(**inputs, **(self._more if inputs.get("fused_lm_head") else {}))
        if inputs.get("fused_lm_head"):
            # Prompt tuning puts virtual tokens before the real ones; they have no labels.
            self.logps, self.aux_loss = out.log_probs.sum(1), getattr(out, "aux_loss", None)
            if "collisions" in self._more:
                self.log_collisions = out.log_sum_sq_probs.sum(1)
        return out


def sigmoid_derivative(beta: float, ref_logps: Tensor) -> Derivative:
    """The derivative of Σ −log σ(β[(log π_w − ref_w) − (log π_l − ref_l)]), ref_logps (2P,)."""

    def derivative(logps: Tensor, responses: Tensor) -> Tensor:
        ratios = (logps - ref_logps[responses].to(logps)).view(2, -1)
        by_chosen = -beta * torch.sigmoid(-beta * (ratios[0] - ratios[1]))
        return torch.cat([by_chosen, -by_chosen])

    return derivative


@dataclass(frozen=True)
class AskedModel:
    """A model that is called within a context, in which nothing else is."""

    model: nn.Module
    context: Callable[[], AbstractContextManager[None]]

    def __call__(self, **inputs: Any) -> Any:
        with self.context():
            return self.model(**inputs)


def check_reference(reference: nn.Module, policy: nn.Module) -> None:
    """Raise ValueError for a reference that training the policy would change."""
    if moves_with(reference, policy):
        raise ValueError(
            "the reference is, or shares weights with, the model that is trained: leave ref_model out, or give one of "
            "its own"
        )
    if on_base_of(reference, policy) and hasattr(unwrapped(reference), "get_base_model"):
        raise ValueError(
            "ref_model is a PEFT model around the policy's own base, and its adapters cannot be distinguished from the "
            "policy's: leave ref_model out for the policy as it starts, or give the base for it without adapters"
        )


def _check_trainer(trainer: Any) -> None:
    """Raise ValueError for what this library's head does not compute."""
    whose = "is not for this library's head: set fused_head='trl'"
    if trainer.use_weighting:
        raise ValueError(f"use_weighting {whose}")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(f"DeepSpeed and FSDP {whose}, or train by `tvkd train --nproc N`")


def without_trls_head(model: nn.Module) -> None:
    """Take off the forwards that TRL put over the model's, closures that copies of the model would share."""
    inside = model_inside(model)
    carried = vars(inside)
    for name in ("forward", "_original_forward"):
        while _is_trls(function := getattr(carried.get(name), "__func__", None)):
            carried[name] = getclosurevars(function).nonlocals["original_forward"]  # type: ignore[arg-type]
        if getattr(carried.get(name), "__func__", None) is type(inside).forward and name == "forward":
            del carried[name]


def _is_trls(function: Any) -> bool:
    return isinstance(function, FunctionType) and function.__globals__["__name__"].startswith("trl.")
