"""A teacher's shaping returns over padded rows, as other trainers batch them.

Letters: P pairs (2P rows, chosen first), L row length, M response states, N response tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tvkd_fast.losses import Terminal, running_sums, segment_sums, shaping_returns
from tvkd_fast.models import PolicyWithHead, TeacherWithHead, fingerprint_model
from tvkd_fast.models.lent import adapters_off, undone
from tvkd_fast.ops import soft_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ShapingSettings:
    """The potential and its sum; docs/method.md."""

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
    attention_mask: Tensor | None = None
    """[2P, L] int64, where a row leaves out tokens between those that are read."""

    @classmethod
    def of(cls, input_ids: Tensor, response: Tensor, attention_mask: Tensor | None) -> PaddedRows:
        """Rows as a collator laid them, [2P, L] each: what stands before a row's first token is moved behind its last,
        so that its positions are those it has alone, in whatever model."""
        if attention_mask is None:
            return cls(input_ids, response)
        seen = attention_mask.bool()
        length = seen.shape[1]
        places = torch.arange(length, device=seen.device)
        order = (places + seen.byte().argmax(1, keepdim=True)) % length
        input_ids, response, seen = (x.gather(1, order) for x in (input_ids, response, seen))
        whole = bool((seen == (places < seen.sum(1, keepdim=True))).all())
        return cls(input_ids, response, None if whole else seen.long())

    @property
    def layout(self) -> None:
        """None: these rows are not packed."""

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


class TeacherReturns:
    """Computes Ψ of every row, by a teacher in the policy's tokens; without settings its log-probability instead.

    Teacher and reference are lent. Only while one is called, it is in evaluation mode and has a fused head, and the
    models in `without_adapters` have their adapters off.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        reference: PreTrainedModel | None,
        settings: ShapingSettings | None,
        *,
        without_adapters: Collection[PreTrainedModel] = (),
    ) -> None:
        self.settings = settings
        assert (reference is not None) == (settings is not None and settings.value_from == "implicit_reward")
        self.models = (teacher,) if reference is None else (teacher, reference)
        """The teacher, and its reference where it has one."""
        self._without_adapters = {id(model) for model in without_adapters}
        for model in self.models:
            with self._lent(model, probe=True):
                """Refuses a model that cannot be called."""

    @cached_property
    def fingerprints(self) -> list[str]:
        """Fingerprints of `models`, computed once, since each is a pass over all weights."""
        found = []
        for model in self.models:
            with self._without(model):
                found.append(fingerprint_model(model))
        return found

    @property
    def made_of(self) -> tuple[object, ...]:
        """Everything but a row's tokens that determines its Ψ."""
        return self.fingerprints, self.settings

    def _without(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return adapters_off(model) if id(model) in self._without_adapters else nullcontext()

    @contextmanager
    def _lent(self, model: PreTrainedModel, *, probe: bool = False) -> Iterator[PolicyWithHead]:
        """Prepare the model for a call while the block lasts."""
        with undone(model), self._without(model):
            kind: type[PolicyWithHead] = PolicyWithHead
            options: dict[str, Any] = {}
            if self.settings is not None and self.settings.value_from != "implicit_reward":
                kind, options = TeacherWithHead, {"kappa": self.settings.kappa}
            asked = kind(model, probe=probe, **options).eval()
            # The head may be the policy's, which counts what its own gradients were made of.
            asked.head.stats = None
            yield asked

    @torch.no_grad()
    def of(self, input_ids: Tensor, response: Tensor, ended: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(2P,) float32 Ψ, or log-probabilities in nats without settings, of rows [2P, L], their responses' masks and
        (2P,) whether those end, padded on any side."""
        rows = PaddedRows.of(input_ids, response, attention_mask)
        settings = self.settings
        found = []
        for model in self.models:
            with self._lent(model) as lent:
                found.append(lent(rows))
        if settings is None:
            return segment_sums(found[0], rows.cu_seqlens)
        if settings.value_from == "implicit_reward":
            rewards = found[0] - found[1]
            values = settings.value_scale * running_sums(rewards, rows.cu_seqlens)
        else:
            values = settings.values(*found[0])
        return settings.returns(values, rows.cu_states, ended)
