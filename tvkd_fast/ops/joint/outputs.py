"""The outputs of the joint walk: which sums over the vocabulary each needs, its value, and its gradient by the logits.

p is the student's softmax, q the teacher's, m = (1 − β)p + βq, w = log q/p. Every gradient by the student's logits is

    dz = p·(a + b·w + e·log p + f·p + j·log p/m + k·q/m + t·sign(p − q) + x·log q) + d·q + r·p^α·q^(1−α) + l·1_y

with one factor of each kind per token, so that any weighted mixture of outputs has one dz. The teacher's gradient is
the student's with the two exchanged: KL(q‖p) for KL(p‖q), 1 − β for β, 1 − α for α.

Letters: N tokens, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from tvkd_fast.ops.joint.row_numbers import Numbers, RowSums

Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha"]
Output = Literal["logps", "lse", "entropy", "log_sum_p2", "teacher_lse"] | Kind
KINDS: tuple[str, ...] = get_args(Kind)
OUTPUTS: tuple[str, ...] = (*get_args(get_args(Output)[0]), *KINDS)
SCORE = "score"
"""E_p[log q], of whatever the walk takes for the teacher's logits: `linear_expected_score`'s output."""
OF_STUDENT_ALONE = ("logps", "lse", "entropy", "log_sum_p2")

MOMENTS: dict[str, tuple[str, ...]] = {
    "logps": (),
    "lse": (),
    "teacher_lse": (),
    "entropy": ("entropy",),
    "log_sum_p2": ("p2",),
    "forward_kl": ("forward",),
    "reverse_kl": ("reverse",),
    "jsd": ("p_over_m", "q_over_m"),
    "skew_forward_kl": ("q_over_m", "overlap"),
    "skew_reverse_kl": ("p_over_m", "overlap"),
    "tvd": ("distance", "sign"),
    "alpha": ("power",),
    SCORE: ("score",),
}
"""The sums over the vocabulary that an output takes: forward KL(q‖p), reverse KL(p‖q), entropy −Σ p log p, p2 Σ p²,
p_over_m KL(p‖m), q_over_m KL(q‖m), overlap Σ p·q/m, distance ½Σ|p − q|, sign ½Σ p·sign(p − q), power Σ p^α·q^(1−α),
score Σ p log q."""
_FROM_FINISHED = ("log_sum_p2",)
"""The outputs whose dz holds a moment otherwise than as a factor of p."""
_MIRRORED = {
    "forward_kl": "reverse_kl",
    "reverse_kl": "forward_kl",
    "skew_forward_kl": "skew_reverse_kl",
    "skew_reverse_kl": "skew_forward_kl",
    "teacher_lse": "lse",
    "jsd": "jsd",
    "tvd": "tvd",
    "alpha": "alpha",
}
_MIRRORED_MOMENTS = {
    "forward": "reverse",
    "reverse": "forward",
    "p_over_m": "q_over_m",
    "q_over_m": "p_over_m",
    "overlap": "overlap",
    "distance": "distance",
    "power": "power",
}


@dataclass(frozen=True)
class Outputs:
    """The outputs that are asked for, in their order, with their β and α."""

    names: tuple[str, ...]
    beta: float = 0.5
    alpha: float = 0.5
    clip: tuple[float, float] | None = None
    """Limits of every entry's log q in a score."""

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the sums that they take, each once."""
        return tuple(dict.fromkeys(moment for name in self.names for moment in MOMENTS[name]))

    @property
    def has_teacher(self) -> bool:
        return any(name not in OF_STUDENT_ALONE for name in self.names)

    @property
    def is_finished_late(self) -> bool:
        """Whether dz needs moments otherwise than as a factor of p."""
        return any(name in _FROM_FINISHED for name in self.names)

    def resolved(self) -> Outputs:
        """The same, with the limits of the mixtures under the name of what they are."""
        return replace(self, names=tuple(_at_limit(name, self.beta) for name in self.names))

    def mirrored(self) -> tuple[Outputs, list[int]]:
        """The outputs that the teacher's gradient is of, from the teacher's side, and which of these they are."""
        which = [i for i, name in enumerate(self.names) if name in _MIRRORED]
        names = tuple(_MIRRORED[self.names[i]] for i in which)
        return Outputs(names, 1.0 - self.beta, 1.0 - self.alpha), which


def _at_limit(name: str, beta: float) -> str:
    if name == "jsd" and beta in (0.0, 1.0):
        return "forward_kl" if beta == 0.0 else "reverse_kl"
    if name == "skew_forward_kl" and beta == 0.0:
        return "forward_kl"
    return "reverse_kl" if name == "skew_reverse_kl" and beta == 1.0 else name


def mirrored_moments(moments: Numbers) -> dict[str, Tensor]:
    """The moments with student and teacher exchanged."""
    found = {_MIRRORED_MOMENTS[name]: x for name, x in moments.items() if name in _MIRRORED_MOMENTS}
    if "sign" in moments:
        found["sign"] = moments["distance"] - moments["sign"]
    return found


def value_of(name: str, beta: float, sums: RowSums, moments: Numbers) -> Tensor:
    """An output (N,) from the sums and the moments, of which "target" is the label's logit."""
    if name == "logps":
        return (moments["target"] - sums.maximum).sub_(sums.log_total)
    if name == "lse":
        return sums.lse
    if name == "teacher_lse":
        return sums.teacher_lse
    if name == "jsd":
        return beta * moments["q_over_m"] + (1.0 - beta) * moments["p_over_m"]
    if name == "log_sum_p2":
        return moments["p2"].log()
    return moments[MOMENTS[name][0]]


def early_factors(outputs: Outputs, upstream: Tensor, moments: Numbers) -> dict[str, Tensor]:
    """The factors of dz under dL/doutput = upstream [O, N], but for p's share that waits for the moments."""
    found: dict[str, Tensor] = {}

    def add(**factors: Tensor) -> None:
        for term, factor in factors.items():
            found[term] = found[term] + factor if term in found else factor

    beta, alpha = outputs.beta, outputs.alpha
    for name, c in zip(outputs.names, upstream, strict=True):
        if name == "logps":
            add(p=-c, label=c)
        elif name == "lse":
            add(p=c)
        elif name == "entropy":
            add(log_p=-c)
        elif name == "log_sum_p2":
            add(p=-2.0 * c, p2=2.0 * c / moments["p2"])
        elif name == "forward_kl":
            add(p=c, q=-c)
        elif name == "reverse_kl":
            add(w=-c)
        elif name == "jsd":
            add(log_p_over_m=c * (1.0 - beta))
        elif name == "skew_forward_kl":
            add(q_over_m=-c * (1.0 - beta))
        elif name == "skew_reverse_kl":
            add(log_p_over_m=c, q_over_m=c * beta)
        elif name == "tvd":
            add(sign=0.5 * c)
        elif name == SCORE:
            add(log_q=c)
        elif name == "alpha":
            add(power=alpha * c)
    return found


def late_factor(outputs: Outputs, upstream: Tensor, moments: Numbers) -> Tensor | None:
    """−Σ c·E_p g (N,), the share of p's factor that takes the moments; None where there is none."""
    shares: list[Tensor] = []
    beta = outputs.beta
    for name, c in zip(outputs.names, upstream, strict=True):
        if name == "entropy":
            shares.append(-c * moments["entropy"])
        elif name == "reverse_kl":
            shares.append(-c * moments["reverse"])
        elif name == "jsd":
            shares.append(-c * (1.0 - beta) * moments["p_over_m"])
        elif name == "skew_forward_kl":
            shares.append(c * (1.0 - beta) * moments["overlap"])
        elif name == "skew_reverse_kl":
            shares.append(-c * (moments["p_over_m"] + beta * moments["overlap"]))
        elif name == "tvd":
            shares.append(-c * moments["sign"])
        elif name == SCORE:
            shares.append(-c * moments["score"])
        elif name == "alpha":
            shares.append(-c * outputs.alpha * moments["power"])
    return None if not shares else torch.stack(shares).sum(0)


def factors_of(outputs: Outputs, upstream: Tensor, moments: Numbers) -> dict[str, Tensor]:
    """All factors of dz, the moments being known."""
    found, late = early_factors(outputs, upstream, moments), late_factor(outputs, upstream, moments)
    if late is not None:
        found["p"] = found["p"] + late if "p" in found else late
    return found


def terms_of(outputs: Outputs) -> tuple[str, ...]:
    """The terms of dz that these outputs have factors of, "p" among them, the label's apart."""
    ones = {moment: torch.ones(1) for moment in outputs.moments}
    found = early_factors(outputs, torch.ones(len(outputs.names), 1), ones)
    return tuple(dict.fromkeys(("p", *(term for term in found if term != "label"))))


def check_outputs(names: Sequence[str], beta: float, alpha: float, *, labels: bool, teacher: bool) -> Outputs:
    """The outputs of these names; refused with the remedy where they do not exist or lack what they are made of."""
    if isinstance(names, str):
        raise ValueError(f"outputs is a sequence of names, got the string {names!r}: write outputs=({names!r},)")
    names = tuple(names)
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or not names:
        raise ValueError(f"outputs must be names among {', '.join(OUTPUTS)}, got {unknown or 'none'}")
    if len(set(names)) != len(names):
        raise ValueError(f"an output is asked for twice: {', '.join(names)}")
    if "logps" in names and not labels:
        raise ValueError("logps needs labels, (N,) token ids: give them, or leave logps out")
    if not teacher and (wanting := [name for name in names if name not in OF_STUDENT_ALONE]):
        raise ValueError(f"{wanting[0]} needs a teacher: give teacher_hidden and teacher_weight")
    if not 0.0 <= beta <= 1.0 or math.isnan(beta):
        raise ValueError(f"beta must be in [0, 1], got {beta}: the teacher's share of the mixture (1 − beta)p + beta·q")
    if "alpha" in names and not 0.0 < alpha < 1.0:
        raise ValueError(
            f"alpha must lie between 0 and 1, got {alpha}: at 0 and at 1 the sum is 1 whatever p and q are; take a KL, "
            "kind='forward_kl' or kind='reverse_kl'"
        )
    return Outputs(names, float(beta), float(alpha))
