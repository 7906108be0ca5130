"""Teacher values on a CPU: log-sum-exp over the vocabulary, forward only, beside its peers and beside the bare product.

    tvkd bench values --shape 4096x576x49152 --json FILE       (or python -m bench.head.values)

Options and method are `bench.head`'s.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bench.harness.inputs import Head
from bench.head.comparison import Contender, contest
from bench.head.contenders import in_torch
from tvkd_fast.ops import linear_lse


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_lse(hidden, weight)[0]


def ours_at_half(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """κ = 1/2: both sums of the same product."""
    return linear_lse(hidden, weight, kappa=0.5)[0]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).logsumexp(1)


@lru_cache
def by_torch_compile() -> Head:
    return torch.compile(eager, dynamic=False)


def contenders() -> dict[str, Contender]:
    return {
        "tvkd_fast": Contender(ours, forward=True),
        "tvkd_fast, without numba": Contender(in_torch(ours), forward=True),
        "tvkd_fast, kappa 1/2": Contender(ours_at_half, forward=True),
        "eager logsumexp": Contender(eager, forward=True),
        "torch.compile": Contender(lambda *x: by_torch_compile()(*x), forward=True, needs="g++", compiles=True),
    }


if __name__ == "__main__":
    contest(__doc__, contenders())
