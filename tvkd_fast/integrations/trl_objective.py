"""An objective of this library in TRL's trainer: what it may need there, and a batch as it reads one.

Letters: P pairs of a batch (2P rows, chosen first), L row length, K rewards.
"""

from __future__ import annotations

from copy import copy
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.integrations.rows import RESPONSES
from tvkd_fast.integrations.teacher import PaddedRows
from tvkd_fast.integrations.trl_config import TVKDConfig
from tvkd_fast.objectives import Need, Objective, objective_named
from tvkd_fast.objectives.mixtures.mixture import Mixture
from tvkd_fast.objectives.tvkd import TVKD

ANSWERED = frozenset({Need.REJECTED, Need.REFERENCE, Need.TEACHER_LOGPS, Need.REWARDS, Need.COLLISIONS})
"""The needs that the trainer answers from numbers per response; TVKD's shaping is computed by TRL's own code."""
REPLACED = (
    "alpha",
    "beta",
    "discopop_tau",
    "f_divergence_type",
    "gamma",
    "kappa",
    "label_smoothing",
    "ld_alpha",
    "loss_type",
    "loss_weights",
    "terminal",
    "use_weighting",
    "value_from",
    "value_scale",
)
"""Settings of TRL's and TVKD's loss, which an objective has in its place."""


def objective_of(given: str | Objective, args: TVKDConfig) -> tuple[Objective | None, TVKDConfig]:
    """The objective in place of TRL's loss, by its name or with its settings, and the trainer's settings under it.

    None for TVKD, whose settings become those of the returned `args`: TRL's code computes it over a shifted reference.
    Raises ValueError for an objective that needs what the trainer does not compute, and for settings that it replaces.
    """
    found = objective_named(given)() if isinstance(given, str) else given
    if not isinstance(found, Objective):
        raise ValueError(f"objective is a {type(given).__name__}: give a name such as 'simpo', or SimPO(beta=2.0)")
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(TVKDConfig)
    }
    odd = [name for name in REPLACED if getattr(args, name) != defaults[name]]
    if odd:
        raise ValueError(
            f"{', '.join(odd)} of TVKDConfig would not be read, since objective has settings of its own: give "
            f"objective={type(found).__name__}(…) its settings, and leave these out"
        )
    if isinstance(found, TVKD):
        return None, _under(found, args)
    missing = found.needs - ANSWERED
    if missing or found.alone:
        what = ", ".join(sorted(need.value for need in missing)) or "more than numbers per response"
        raise ValueError(
            f"{found.name} needs {what}, which TVKDTrainer does not compute: run `tvkd train --objective {found.name}`"
        )
    parts = [part for part, _ in found.objectives] if isinstance(found, Mixture) else [found]
    if Need.REJECTED not in found.needs or any(part.divided_by != "pairs" for part in parts):
        raise ValueError(
            f"{found.name} is no loss over pairs, of which TVKDTrainer takes the mean: run `tvkd train --objective "
            f"{found.name}`, or take TRL's loss_type=['sft'] for supervised fine-tuning"
        )
    return found, args


def _under(tvkd: TVKD, args: TVKDConfig) -> TVKDConfig:
    settings = tvkd.settings()
    if settings.pop("label_smoothing"):
        raise ValueError(
            "TRL's code computes tvkd here and smooths no labels: set label_smoothing=0, or run `tvkd train`"
        )
    args = copy(args)
    for name, value in settings.items():
        setattr(args, name, value)
    return args


def check_given(objective: Objective, args: TVKDConfig, *, has_teacher: bool, has_reference: bool) -> None:
    """Raise ValueError where a model or reward is missing that the objective reads, or given and not read."""
    name, needs = objective.name, objective.needs
    if has_teacher != (Need.TEACHER_LOGPS in needs):
        raise ValueError(
            f"{name} reads no teacher: leave teacher_model out"
            if has_teacher
            else f"{name} reads {Need.TEACHER_LOGPS.value}: give teacher_model"
        )
    asked = [option for option in ("precompute_ref_log_probs", "sync_ref_model") if getattr(args, option)]
    if Need.REFERENCE not in needs and (has_reference or asked):
        given = ["ref_model"] * has_reference + asked
        raise ValueError(f"{name} reads no reference: leave {', '.join(given)} out")
    if Need.COLLISIONS in needs and args.fused_head == "trl":
        raise ValueError(f"{name} needs {Need.COLLISIONS.value}, which TRL's is not asked for: set fused_head='tvkd'")
    count = 0 if args.rewards is None else len(args.rewards)
    if count and Need.REWARDS not in needs:
        raise ValueError(f"{name} reads no rewards: leave rewards out")
    if count > 1 and not objective.several_rewards:
        raise ValueError(f"{name} reads one reward and rewards names {count}: name one, such as {args.rewards[:1]}")  # type: ignore[index]


def batch_of(inputs: dict[str, Any], rewards: Tensor | None) -> PairBatch:
    """TRL's batch of padded rows, [2P, L] each, as objectives read one; `rewards` [K, 2P] where the data has some."""
    completion, attention = inputs["completion_mask"].bool(), inputs["attention_mask"]
    rows = PaddedRows.of(inputs["input_ids"], completion, attention)
    cu_seqlens = rows.cu_seqlens
    return PairBatch(
        pairs=torch.arange(len(completion) // 2),
        input_ids=rows.input_ids,
        predicting=rows.predicting,
        labels=rows.labels,
        cu_seqlens=cu_seqlens,
        states=rows.states,
        cu_states=rows.cu_states,
        ended=inputs[RESPONSES[1]],
        num_tokens=int(attention.sum()),
        response_lengths=tuple(cu_seqlens.diff().tolist()),
        rewards=rewards,
    )
