"""A teacher's shaping returns over padded rows, as other trainers batch them.

Letters: P pairs (2P rows, chosen first), L row length, M response states, N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tvkd_fast.losses import Terminal, running_sums, shaping_returns
from tvkd_fast.models import PolicyWithHead, TeacherWithHead, fingerprint_model
from tvkd_fast.ops import soft_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ShapingSettings:
    """Which potential, and how it is summed; docs/method.md."""

    gamma: float
    kappa: float
    value_scale: float
    value_from: Literal["logits", "logprobs", "implicit_reward"]
    terminal: Terminal

    def values(self, lse: Tensor, lse_kappa: Tensor) -> Tensor:
        """(M,) soft values from a teacher's two sums."""
        assert self.value_from != "implicit_reward"
        return soft_values(lse, lse_kappa, kappa=self.kappa, value_scale=self.value_scale, value_from=self.value_from)

    def returns(self, values: Tensor, cu_states: Tensor, ended: Tensor) -> Tensor:
        """(2P,) Ψ."""
        return shaping_returns(values, cu_states, gamma=self.gamma, terminal=self.terminal, ended=ended)


@dataclass(frozen=True)
class PaddedRows:
    """Rows padded on the right, where a causal model cannot see the padding; a `models.ModelBatch`."""

    input_ids: Tensor
    """[2P, L]"""
    response: Tensor
    """[2P, L] bool: the tokens of each row's response, one run."""

    @property
    def layout(self) -> None:
        """Of packed rows, which these are not."""

    @property
    def predicting(self) -> Tensor:
        """(N,) flat positions of the states that predict response tokens; a row's first token is predicted by none."""
        return self._predicts.flatten().nonzero()[:, 0]

    @property
    def labels(self) -> Tensor:
        """(N,) those tokens."""
        return self.input_ids.flatten()[self.predicting + 1]

    @property
    def states(self) -> Tensor:
        """(M,) flat positions of every response state."""
        return self._kept.flatten().nonzero()[:, 0]

    @property
    def cu_seqlens(self) -> Tensor:
        """(2P+1,) boundaries of the tokens."""
        return F.pad(self._predicts.sum(1).cumsum(0), (1, 0))

    @property
    def cu_states(self) -> Tensor:
        """(2P+1,) boundaries of the states."""
        return F.pad(self._kept.sum(1).cumsum(0), (1, 0))

    @property
    def _predicts(self) -> Tensor:
        return F.pad(self.response[:, 1:], (0, 1))

    @property
    def _kept(self) -> Tensor:
        return self.response | self._predicts

    def ended(self, eos: int) -> Tensor:
        """(2P,) bool: whether a response's last token is the end-of-sequence token."""
        places = torch.arange(self.response.shape[1], device=self.response.device)
        lasts = (self.response * places).argmax(1)
        return self.input_ids.gather(1, lasts[:, None])[:, 0] == eos


class TeacherReturns:
    """Ψ of every row, by a frozen teacher in the policy's tokens."""

    def __init__(
        self, teacher: PreTrainedModel, reference: PreTrainedModel | None, settings: ShapingSettings, *, eos: int
    ) -> None:
        self.settings, self.eos = settings, eos
        rewards = reference is not None
        assert rewards == (settings.value_from == "implicit_reward")
        self.teacher = PolicyWithHead(teacher) if rewards else TeacherWithHead(teacher, kappa=settings.kappa)
        self.reference = None if reference is None else PolicyWithHead(reference)
        for model in self.models:
            model.eval().requires_grad_(False)

    @property
    def models(self) -> tuple[PolicyWithHead, ...]:
        """The teacher, and its reference where it has one."""
        return (self.teacher,) if self.reference is None else (self.teacher, self.reference)

    @cached_property
    def fingerprints(self) -> list[str]:
        """Of both: a pass over all weights, so made once however many datasets there are."""
        return [fingerprint_model(model.model) for model in self.models]

    @property
    def made_of(self) -> tuple[object, ...]:
        """What decides Ψ of a row's tokens."""
        return self.fingerprints, self.settings, self.eos

    @torch.no_grad()
    def of(self, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
        """(2P,) float32 Ψ of rows [2P, L] and their masks."""
        rows = PaddedRows(input_ids, completion_mask.bool())
        settings = self.settings
        if self.reference is not None:
            rewards = self.teacher(rows) - self.reference(rows)
            values = settings.value_scale * running_sums(rewards, rows.cu_seqlens)
        else:
            values = settings.values(*self.teacher(rows))
        return settings.returns(values, rows.cu_states, rows.ended(self.eos))
