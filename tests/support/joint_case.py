"""Two models' states and heads for the tests of the joint walk, and their float64 twins.

Letters: N tokens, D hidden of the student, D' of the teacher, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.ops import Head, reference

LEAVES = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")


@dataclass
class JointCase:
    """Six leaves by name (a bias may be None), labels and upstream gradients, and the transforms of both heads."""

    leaves: dict[str, Tensor | None]
    labels: Tensor
    upstream: Tensor
    transforms: dict[str, Any] = field(default_factory=dict)
    """softcap and logit_scale, and the teacher's."""

    @classmethod
    def draw(
        cls,
        shape: tuple[int, int, int, int],
        *,
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
        spread: float = 1.0,
        seed: int = 0,
        **transforms: Any,
    ) -> JointCase:
        n, d, wide, v = shape
        draw = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw).mul_(spread).to(dtype).requires_grad_()

        sizes = [(n, d), (v, d), (v,) if bias else None, (n, wide), (v, wide), (v,) if bias else None]
        leaves = {name: None if size is None else normal(*size) for name, size in zip(LEAVES, sizes, strict=True)}
        labels = torch.randint(v, (n,), generator=draw)
        return cls(leaves, labels, torch.randn(12, n, generator=draw, dtype=torch.float64), transforms)

    def heads(self) -> tuple[Head, Head]:
        options = self.transforms
        student = Head(self._of("weight"), self.leaves["bias"], options.get("softcap"), options.get("logit_scale", 1.0))
        teacher = Head(
            self._of("teacher_weight"),
            self.leaves["teacher_bias"],
            options.get("teacher_softcap"),
            options.get("teacher_logit_scale", 1.0),
        )
        return student, teacher

    def arguments(self) -> tuple[Tensor, Head, Tensor, Head]:
        student, teacher = self.heads()
        return self._of("hidden"), student, self._of("teacher_hidden"), teacher

    def double(self) -> JointCase:
        return self.upcast(torch.float64)

    def upcast(self, dtype: torch.dtype) -> JointCase:
        wide = {k: None if x is None else x.detach().to(dtype).requires_grad_() for k, x in self.leaves.items()}
        return JointCase(wide, self.labels, self.upstream, self.transforms)

    def logits(self, index: Tensor | None = None, *, rounded_to: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """The twin's whole logits of student and teacher; their gradients are rounded once on their way."""
        hidden, student, teacher_hidden, teacher = self.arguments()
        z, u = (
            reference.logits(h, head.weight, head.bias, head.softcap, head.logit_scale)
            for h, head in ((hidden, student), (teacher_hidden, teacher))
        )
        if rounded_to.itemsize == 2:
            for logits in (z, u):
                if logits.requires_grad:
                    logits.register_hook(lambda grad: rounded(grad, rounded_to))
        return z, u if index is None else u[:, index]

    def twin(
        self,
        outputs: Sequence[str],
        *,
        index: Tensor | None = None,
        rounded_to: torch.dtype = torch.float64,
        **options: Any,
    ) -> dict[str, Tensor]:
        logits = self.logits(index, rounded_to=rounded_to)
        return reference.linear_joint(*logits, self.labels, outputs=outputs, **options)

    def gradients(self, found: dict[str, Tensor]) -> list[Tensor]:
        """Of Σ upstream·outputs by every leaf, zeros where none comes."""
        leaves = [x for x in self.leaves.values() if x is not None]
        loss = sum((c * x.double()).sum() for c, x in zip(self.upstream, found.values(), strict=False))
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]

    def _of(self, name: str) -> Tensor:
        found = self.leaves[name]
        assert found is not None
        return found


def rounded(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Once to 16 bits, as a product takes it; of float16 in a range that a power of 2 has moved."""
    most = float(grad.abs().nan_to_num(posinf=0.0).max()) if grad.numel() else 0.0
    factor = 2.0 ** (math.ceil(math.log2(most)) - 14) if dtype == torch.float16 and most > 0.0 else 1.0
    return (grad / factor).to(dtype).to(grad.dtype) * factor


def no_noisier(got: Sequence[Tensor], twin: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    """Errors against float64 of at most 1.5 times plain torch's, in Frobenius' norm, plus 1e-5 of the twin's.

    The largest error of a few hundred numbers that are rounded to 16 bits twice is a matter of chance.
    """
    for x, y, z in zip(got, twin, plain, strict=True):
        error, allowed = (x.double() - y).norm(), (z.to(x.dtype).double() - y).norm()
        assert error <= 1.5 * allowed + 1e-5 * y.norm(), f"error {error:.3g}, plain torch {allowed:.3g}"


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    """Relative in Frobenius' norm; where the twin's is 0 to rounding, absolute."""
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y).norm() <= tolerance * (y.norm() + 1e-6 * y.numel() ** 0.5)
