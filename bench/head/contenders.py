"""The heads that are compared on a CPU: ours, plain torch, and the peers'."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.contenders import trl
from bench.harness.inputs import Head, sequences
from bench.harness.reference import BETA
from bench.head.comparison import Contender
from tvkd_fast import linear_logps, linear_soft_values
from tvkd_fast.ops.tiles import native

WORKSPACE = 1024
"""MiB in which exact gradients may keep logits; at the packaged shape all 4,096 rows' take 768."""
LIMITS = {"2^-14": 5e-2, "2^-16": 2e-2, "2^-18": 1e-2, "unbiased 2^-14": 1e-1}


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def eager_logsumexp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(-1)


def cce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile")


def liger_dpo(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A loss, not log-probabilities."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=shutil.which("g++") is not None)
    return loss(weight, sequences(hidden), sequences(labels))[0]


def in_torch(run: Head) -> Head:
    """Without the numba extra, in a process that takes this and nothing else."""

    def without(*args: Tensor) -> Tensor:
        native.passes = lambda z: None
        return run(*args)

    return without


def values(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_soft_values(hidden, weight)


def contenders() -> dict[str, Contender]:
    def sparse(eps: float, **options: Any) -> Head:
        return partial(linear_logps, grad_mode="sparse", eps=eps, **options)

    small, smaller = Contender(sparse(2.0**-14), LIMITS["2^-14"]), Contender(sparse(2.0**-16), LIMITS["2^-16"])
    unbiased = Contender(sparse(2.0**-14, tail="unbiased", seed=0), LIMITS["unbiased 2^-14"])
    return {
        "tvkd_fast, sparse 2^-14": small,
        "tvkd_fast, sparse 2^-14, memory touched": replace(small, reuse=True),
        "tvkd_fast, sparse 2^-14, without numba": replace(small, run=in_torch(small.run)),
        "tvkd_fast, sparse 2^-14, whatever the tail": Contender(sparse(2.0**-14, max_tail=1.0), 1.0, by_name=True),
        "tvkd_fast, sparse 2^-16": smaller,
        "tvkd_fast, sparse 2^-18": Contender(sparse(2.0**-18), LIMITS["2^-18"]),
        "tvkd_fast, sparse 2^-14, unbiased": unbiased,
        "tvkd_fast, sparse 2^-14, frozen head": replace(small, frozen=True),
        "tvkd_fast, exact": Contender(linear_logps),
        "tvkd_fast, exact, logits kept": Contender(partial(linear_logps, workspace_mb=WORKSPACE)),
        "tvkd_fast, exact, frozen head": Contender(linear_logps, frozen=True),
        "tvkd_fast, values": Contender(values, forward=True),
        "eager log-softmax": Contender(eager),
        "eager logsumexp": Contender(eager_logsumexp),
        "torch.compile": Contender(lambda *args: by_torch_compile()(*args), needs="g++", compiles=True),
        "TRL, chunked head": Contender(trl, needs="trl"),
        "CCE, torch_compile": Contender(cce, needs="cut_cross_entropy", compiles=True),
        "Liger, fused DPO": Contender(liger_dpo, needs="liger_kernel", preference=True),
    }


@lru_cache
def by_torch_compile() -> Head:
    return torch.compile(eager, dynamic=False)
