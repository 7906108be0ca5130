"""The settings of the head's gradient, and the statistics of sparse gradients."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

GradMode = Literal["exact", "sparse", "auto"]
Tail = Literal["even", "unbiased"]
GRAD_MODES = ("exact", "sparse", "auto")
TAILS = ("even", "unbiased")
LARGEST_EPS = 2.0**-4


@dataclass(frozen=True, kw_only=True)
class HeadGradient:
    """The method of the head's gradient: exactly, or from the softmax's few entries (docs/numerics.md, what it costs).

    Raises:
        ValueError: a setting that does not exist or is out of its range.

    Examples:
        >>> import torch
        >>> gradient = HeadGradient(grad_mode="sparse")
        >>> gradient.eps_for(torch.float32) == 2.0**-16, gradient.cap_for(49152)
        (True, 3072)
    """

    grad_mode: GradMode = "exact"
    """exact; sparse; or auto, which is sparse but for calls with more entries than pay on this machine."""
    eps: float | None = None
    """ε: softmax entries below it are not kept. None: 2⁻¹⁶ in float32 and float64, 2⁻¹⁴ in 16 bits."""
    row_cap: int | None = None
    """A row with more entries gets the exact gradient. None: V/16."""
    tail: Tail = "even"
    """The treatment of the rest: spread evenly over all other columns, or an entry kept with probability p/ε as ε."""
    seed: int | None = None
    """The seed of the unbiased tail, in [0, 2³¹); None draws one per call from torch's generator."""
    max_tail: float = 0.1
    """The limit of the mean probability that is left out; beyond it every row gets the exact gradient."""
    workspace_mb: int = 0
    """MiB of logits, 4·V bytes per row, that exact gradients may hold. Where the forward makes the gradient (training
    steps and fused losses), a block's while it does (0: 104 on a CPU, in Triton up to 1,024 as the device has memory).
    Elsewhere in torch from forward to backward, three products and not four."""

    def __post_init__(self) -> None:
        if self.grad_mode not in GRAD_MODES:
            raise ValueError(f"grad_mode must be one of {', '.join(GRAD_MODES)}, got {self.grad_mode!r}")
        for name in ("row_cap", "seed", "workspace_mb"):
            if not isinstance(getattr(self, name), int | None):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must lie in [0, 2**31), got {self.seed}: a larger one would repeat another's draws")
        if self.eps is not None and not 0 <= self.eps <= LARGEST_EPS:
            raise ValueError(f"eps must lie in [0, 2**-4], got {self.eps}: 2**-14 and 2**-16 are the usual ones")
        if self.row_cap is not None and self.row_cap < 1:
            raise ValueError(
                f"row_cap must be at least 1 entry, got {self.row_cap}; None is a sixteenth of the vocabulary"
            )
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {self.tail!r}")
        if not 0 <= self.max_tail <= 1:
            raise ValueError(f"max_tail is a probability in [0, 1], got {self.max_tail}")
        if self.workspace_mb < 0:
            raise ValueError(f"workspace_mb is memory in MiB, 0 for none, got {self.workspace_mb}")
        if self.workspace_mb and self.grad_mode != "exact":
            raise ValueError(
                f"workspace_mb keeps logits for exact gradients, which grad_mode={self.grad_mode!r} is not: leave it 0"
            )

    def options(self) -> dict[str, Any]:
        """The settings as arguments of an op. `dataclasses.asdict` copies, which not every torch can trace."""
        return {name: getattr(self, name) for name in OPTIONS}

    def eps_for(self, dtype: torch.dtype) -> float:
        if self.eps is not None:
            return self.eps
        return 2.0**-14 if dtype in (torch.float16, torch.bfloat16) else 2.0**-16

    def seed_for(self) -> int:
        if self.tail == "even":
            return 0
        return int(torch.randint(2**31, ())) if self.seed is None else self.seed

    def cap_for(self, vocab_size: int) -> int:
        return max(1, vocab_size // 16) if self.row_cap is None else self.row_cap


OPTIONS = tuple(field.name for field in fields(HeadGradient))


class HeadStats:
    """Statistics of sparse gradients, summed over calls on their device: reading them waits, adding does not.

    Examples:
        >>> import torch
        >>> from tvkd_fast import linear_logps
        >>> stats, hidden = HeadStats(), 20 * torch.eye(4, requires_grad=True)
        >>> logps = linear_logps(hidden, torch.eye(32, 4), torch.arange(4), grad_mode="sparse", stats=stats)
        >>> stats.read()["head_dense_rows"]
        0.0
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """Add one call's (5,): tokens, entries beside the labels', candidates for them, Σ tail, dense rows.

        Triton's kernels prune in the backward: in theirs, every selected entry counts as kept.
        """
        self.sums = sums if self.sums is None else self.sums + sums

    def read(self) -> dict[str, float]:
        """Return the entries per token and the mean tail of rows that were not dense, the share of dense rows, and
        `head_marked`: selected entries, of dense rows too, over those that were kept.
        """
        if self.sums is None:
            return {}
        tokens, entries, candidates, tail, dense = self.sums.tolist()
        sparse = max(tokens - dense, 1.0)
        return {
            "head_entries": entries / sparse,
            "head_marked": candidates / max(entries, 1.0),
            "head_tail": tail / sparse,
            "head_dense_rows": dense / max(tokens, 1.0),
        }

    def reset(self) -> None:
        self.sums = None
