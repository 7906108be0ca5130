"""The public tensor ops: hidden states and a head's weight go in, per-token numbers come out, logits never exist."""

from tvkd_fast.kernels.records import Head
from tvkd_fast.ops.checks import unchecked
from tvkd_fast.ops.gradient import HeadGradient, HeadStats
from tvkd_fast.ops.joint.cached_forward_kl import ExpectedRows, linear_cached_forward_kl, linear_expected_rows
from tvkd_fast.ops.joint.divergence import linear_divergence, linear_joint
from tvkd_fast.ops.joint.expected_score import linear_expected_score
from tvkd_fast.ops.joint.sparse_divergence import linear_sparse_divergence
from tvkd_fast.ops.known import Upstream, known_logps, makes_in_forward
from tvkd_fast.ops.logps import linear_logps
from tvkd_fast.ops.values import check_kappa, linear_entropy, linear_lse, linear_soft_values, soft_values

__all__ = [
    "ExpectedRows",
    "Head",
    "HeadGradient",
    "HeadStats",
    "Upstream",
    "check_kappa",
    "known_logps",
    "linear_cached_forward_kl",
    "linear_divergence",
    "linear_entropy",
    "linear_expected_rows",
    "linear_expected_score",
    "linear_joint",
    "linear_logps",
    "linear_lse",
    "linear_soft_values",
    "linear_sparse_divergence",
    "makes_in_forward",
    "soft_values",
    "unchecked",
]
