"""Orthogonal rotations of states under which no coordinate stands out, so that one scale serves a row in eight bits.

A rotation R is a diagonal of random signs and a Kronecker product of small orthogonal matrices: Hadamard's for the
powers of two in D, the cosine transform's for what is odd. It folds into a head: h·w = (Rh)·(Rw).

Letters: N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tvkd_fast.ops import Head

_AT_ONCE = 4096
"""Rows of a head that are rotated together, in float64."""
_TOLERANCE = 1e-10


class Rotation:
    """x ↦ (F₁ ⊗ F₂ ⊗ …)·(s ⊙ x) for signs s (D,) and square factors whose sizes multiply to D.

    Raises ValueError where it is none or not orthogonal: logits, and distances between states, would not stay what they
    are.
    """

    def __init__(self, signs: Tensor, factors: Sequence[Tensor]) -> None:
        self.signs, self.factors = signs.double(), [factor.double() for factor in factors]
        if math.prod(len(factor) for factor in self.factors) != len(signs):
            sizes = " x ".join(str(len(factor)) for factor in self.factors)
            raise ValueError(f"a rotation of {len(signs)} coordinates has factors of {sizes}")
        for factor in self.factors:
            if factor.shape != (len(factor), len(factor)):
                raise ValueError(f"a rotation's factors are square, and one is {list(factor.shape)}")
            off = (factor @ factor.T - torch.eye(len(factor), dtype=torch.float64)).abs().max()
            if not off <= _TOLERANCE:
                raise ValueError(f"the rotation is not orthogonal: its product with its transpose is off by {off:.1e}")
        if not bool((self.signs.abs() == 1).all()):
            raise ValueError("the rotation is not orthogonal: its signs must be 1 or -1")

    @classmethod
    def seeded(cls, width: int, seed: int) -> Rotation:
        """A randomised Hadamard transform of any width, the same for a seed everywhere."""
        signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        twos = (width & -width).bit_length() - 1
        halves = (twos // 2, twos - twos // 2)
        return cls(signs, [*(_hadamard(power) for power in halves), _cosines(width >> twos)])

    def of(self, rows: Tensor) -> Tensor:
        """[N, D] to R of each row, in its dtype."""
        x = (rows * self.signs.to(rows)).view(-1, *(len(factor) for factor in self.factors))
        for axis, factor in enumerate(self.factors, 1):
            x = (x.transpose(axis, -1) @ factor.to(rows).T).transpose(axis, -1)
        return x.reshape(rows.shape)

    def folded(self, head: Head) -> Head:
        """The head that gives rotated states the logits that `head` gives them as they were."""
        weight = torch.empty_like(head.weight)
        for rows, into in zip(head.weight.split(_AT_ONCE), weight.split(_AT_ONCE), strict=True):
            into.copy_(self.of(rows.double()))
        return replace(head, weight=weight)


def _hadamard(power: int) -> Tensor:
    """[2ᵖ, 2ᵖ] orthogonal, of entries ±2^(−p/2)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * 2.0 ** (-power / 2)


def _cosines(size: int) -> Tensor:
    """[m, m] the orthonormal DCT-II."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2.0 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix
