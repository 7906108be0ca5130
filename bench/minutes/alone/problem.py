"""The small ragged problem that every kernel is run on, its tensors between guards, and what float64 makes of it.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bench.minutes.cases import Scale
from bench.minutes.guards import Guarded
from tvkd_fast.kernels.records import Head, HeadSums

SHAPE, TINY = (300, 576, 5003), (40, 32, 150)
NATS = 1e-3
"""What a log-sum-exp may be off: a hundred times the rounding of float32."""


class Problem:
    """hidden [N, D], weight [V, D], labels and coefficients (N,) between guards; their softmax in float64."""

    def __init__(self, scale: Scale, dtype: torch.dtype, memory: Guarded) -> None:
        self.shape = n, d, v = scale.of(SHAPE, TINY)
        self.dtype, self.memory = dtype, memory
        draw = torch.Generator().manual_seed(0)

        def on_device(x: Tensor) -> Tensor:
            return memory.copied(x.to(scale.device))

        self.hidden = on_device(torch.randn(n, d, generator=draw).to(dtype))
        self.weight = on_device((torch.randn(v, d, generator=draw) * 3 / d**0.5).to(dtype))
        labels = torch.randint(v, (n,), generator=draw)
        labels[::5] = -100
        labels[-1] = v - 1
        self.labels = on_device(labels)
        self.coefficients = on_device(torch.randn(n, generator=draw))
        self.head = Head(self.weight)
        self.kept = self.labels != -100
        self.own = self.labels.where(self.kept, 0)[:, None]

    @cached_property
    def z(self) -> Tensor:
        """[N, V] float64 logits."""
        return self.hidden.double() @ self.weight.double().T

    @cached_property
    def p(self) -> Tensor:
        return self.z.softmax(1)

    @cached_property
    def others(self) -> Tensor:
        """(N,) log Σ_{j≠y} exp z_j."""
        return self.z.scatter(1, self.own, -torch.inf).logsumexp(1)

    @cached_property
    def delta(self) -> Tensor:
        """[N, V] p − δ, 0 where a label is ignored."""
        return (self.p - torch.zeros_like(self.p).scatter_(1, self.own, 1.0)) * self.kept[:, None]

    @cached_property
    def sums(self) -> HeadSums:
        lse = self.z.logsumexp(1)
        top = self.z.amax(1)
        return HeadSums(top.float(), (lse - top).float(), target=self.z.gather(1, self.own)[:, 0].float())

    @property
    def rounding(self) -> float:
        """The relative error that one rounding to the dtype, and sums of such numbers, may leave."""
        return 2 * torch.finfo(self.dtype).eps + 1e-4
