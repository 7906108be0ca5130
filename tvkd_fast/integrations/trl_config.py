"""The settings of `TVKDTrainer`, and what it cannot train with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trl import DPOConfig

from tvkd_fast.integrations.teacher import ShapingSettings
from tvkd_fast.losses import Terminal, check_discount, check_preference_settings
from tvkd_fast.ops import check_kappa

OF_MARGINS = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""TRL's losses that see the pair's margin alone, or no reference at all."""


@dataclass
class TVKDConfig(DPOConfig):
    """DPOConfig and the shaping; with `alpha=0`, or without a teacher, a run is DPO's own."""

    alpha: float = field(default=1.0, metadata={"help": "α: strength and sign of the teacher's shaping; 0 is DPO."})
    gamma: float = field(default=1.0, metadata={"help": "γ in [0, 1]: discount of the shaping."})
    kappa: float = field(default=1.0, metadata={"help": "κ > 0: inverse temperature of the teacher's soft value."})
    value_scale: float | None = field(
        default=None, metadata={"help": "b: scale of the soft value; `beta` where not given, as in the paper."}
    )
    value_from: Literal["logits", "logprobs", "implicit_reward"] = field(
        default="logits", metadata={"help": "What the soft value is made of; docs/method.md."}
    )
    terminal: Terminal = field(default="last_content", metadata={"help": "Which state ends the shaping sum."})
    precompute_teacher: bool = field(
        default=True,
        metadata={
            "help": "Run the teacher once over the data before training, and keep two numbers per pair; otherwise it "
            "runs on every batch, as it must over an IterableDataset."
        },
    )
    rewards: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards in the data that an objective over rewards reads, such as [score] for score_chosen and "
            "score_rejected; where not given the one that there is."
        },
    )
    fused_head: Literal["auto", "tvkd", "trl"] = field(
        default="auto",
        metadata={
            "help": "Whose vocabulary head computes log-probabilities: `auto` takes this library's on a CPU and TRL's "
            "elsewhere."
        },
    )
    grad_mode: Literal["exact", "sparse", "auto"] = field(
        default="exact", metadata={"help": "How this library's head is differentiated; docs/sparse.md."}
    )
    eps: float | None = field(default=None, metadata={"help": "ε of sparse gradients."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preference_settings(self.beta, self.alpha, 0.0)
        check_discount(self.gamma)
        check_kappa(self.kappa)
        if self.value_from == "logprobs" and self.kappa == 1.0:
            raise ValueError(
                "value_from='logprobs' is 0 everywhere at kappa=1: set kappa to another value, such as 0.7"
            )
        if (self.grad_mode, self.eps) != ("exact", None) and self.fused_head == "trl":
            raise ValueError("grad_mode and eps are of this library's head: set fused_head='tvkd', or leave them out")


def shaping_settings(args: TVKDConfig) -> ShapingSettings:
    return ShapingSettings(
        gamma=args.gamma,
        kappa=args.kappa,
        value_scale=args.beta if args.value_scale is None else args.value_scale,
        value_from=args.value_from,
        terminal=args.terminal,
    )


def check_shaping(args: TVKDConfig, *, has_reference: bool, cached: bool) -> None:
    """Raise ValueError for what is no function of the margin alone, which a shifted reference shifts."""
    if cached and has_reference:
        raise ValueError("scores were made with the teacher's reference or without it: leave out teacher_reference")
    if cached and not args.precompute_teacher:
        raise ValueError("scores are on disk, and no teacher exists to run on a batch: leave precompute_teacher True")
    if cached and args.truncation_mode != "keep_start":
        raise ValueError("scores are of responses cut at their ends: set truncation_mode='keep_start', TRL's default")
    if not cached and has_reference != (args.value_from == "implicit_reward"):
        raise ValueError(
            "value_from='implicit_reward' is what the teacher gained over the model that it was before DPO: give "
            "teacher_reference with it, and with it alone"
        )
    odd = [loss for loss in args.loss_type if loss not in OF_MARGINS]
    if odd:
        raise ValueError(
            f"loss_type {', '.join(odd)} sees more of a pair than its margin, and a teacher cannot shape that: take "
            f"{', '.join(OF_MARGINS)}, or no teacher_model"
        )
    if args.f_divergence_type != "reverse_kl":
        raise ValueError("a teacher shapes rewards of the reverse KL divergence: set f_divergence_type='reverse_kl'")
    if args.ld_alpha is not None:
        raise ValueError("ld_alpha weighs tokens, and Ψ is of whole responses: leave ld_alpha out, or teacher_model")
