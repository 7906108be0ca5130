"""Mixtures: objectives that add by weights, over one forward of the policy.

Each part is divided by what it is divided by alone, so that a weight means the same beside any other part.

Letters: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.objectives.contract import Factors, Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.divergences.joint_numbers import Joint
from tvkd_fast.objectives.mixtures.setting_types import in_words, is_of
from tvkd_fast.objectives.registry import objective, objective_named, settings_names
from tvkd_fast.scoring.layout import Scores

WEIGHT = "weight"
Part = dict[str, Any]


def _default() -> list[Part]:
    return [{"dpo": {}, WEIGHT: 1.0}, {"sft": {}, WEIGHT: 1.0}]


@dataclass(frozen=True)
class MixtureOutput(ObjectiveOutput):
    """The weighted sum of the parts' losses, not divided yet, and each part's output."""

    parts: tuple[ObjectiveOutput, ...] = ()


@objective("mixture")
@dataclass(kw_only=True)
class Mixture(Objective):
    """Σ_i w_i L_i, each L_i divided by pairs or by tokens as it is alone.

    `objective: [{dpo: {beta: 0.1}, weight: 1}, {forward_kl: {}, weight: 0.1}]` in a recipe is short for this objective
    and its parts. Margins and rewards that are shown are those of the first part that has some.
    """

    parts: list[Part] = field(default_factory=_default)
    """One mapping per objective: its name to its settings, and `weight` w ≥ 0 (1 where not given)."""

    def __post_init__(self) -> None:
        found = [_read(part) for part in self.parts]
        if not sum(weight for _, weight in found):
            raise ValueError(f"the weights of {_names(found)} sum to 0: give at least one objective a weight above 0")
        alone = [part.name for part, _ in found if part.alone]
        if alone:
            raise ValueError(
                f"{alone[0]} measures more of the policy than a mixture does, or changes what is trained or read: "
                "train by it alone"
            )
        # Parts of no weight are neither computed nor scored.
        self.objectives = tuple((part, weight) for part, weight in found if weight)
        self._check_teachers()
        self._check_labels()

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(part.needs for part, _ in self.objectives))

    @property
    def joint(self) -> tuple[Joint, ...]:
        return tuple(dict.fromkeys(key for part, _ in self.objectives for key in part.joint))

    @property
    def per_pair(self) -> bool:  # type: ignore[override]
        return all(part.per_pair for part, _ in self.objectives)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return all(part.linear for part, _ in self.objectives)

    @property
    def linear_joint(self) -> tuple[Joint, ...]:
        bent = {
            key for part, _ in self.objectives if not part.linear for key in part.joint if key not in part.linear_joint
        }
        return tuple(key for key in self.joint if key not in bent)

    @property
    def on_policy(self) -> bool:  # type: ignore[override]
        return any(part.on_policy for part, _ in self.objectives)

    @property
    def several_rewards(self) -> bool:  # type: ignore[override]
        return any(part.several_rewards for part, _ in self.objectives)

    @property
    def teacher_kappa(self) -> float:
        return next((part.teacher_kappa for part, _ in self.objectives if Need.TEACHER_SUMS in part.needs), 1.0)

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> MixtureOutput:
        parts = tuple(part.loss(policy, scores, batch) for part, _ in self.objectives)
        losses = sum(weight * out.losses for out, (_, weight) in zip(parts, self.objectives, strict=True))
        shown = next((out for out in parts if out.margins is not None), parts[0])
        assert isinstance(losses, Tensor)
        return MixtureOutput(
            losses, shown.margins, shown.chosen_rewards, shown.rejected_rewards, shown.shaping_margins, parts
        )

    def total(self, out: ObjectiveOutput, factors: Factors | None, pairs: Tensor | None = None) -> Tensor:
        if factors is None:
            return super().total(out, None, pairs)
        assert isinstance(out, MixtureOutput)
        first, *others = (
            weight * part.total(of_part, factors, pairs)
            for of_part, (part, weight) in zip(out.parts, self.objectives, strict=True)
        )
        return sum(others, start=first)

    def without(self, missing: Collection[Need]) -> Objective | None:
        """What the first part that compares responses shows."""
        if not self.needs & frozenset(missing):
            return self
        found = (part.without(missing) for part, _ in self.objectives if Need.REJECTED in part.needs)
        return next((other for other in found if other is not None), None)

    def describe(self) -> str:
        return " + ".join(
            f"{weight:g} · {part.name}" + (f" ({part.describe()})" if part.settings() else "")
            for part, weight in self.objectives
        )

    def _check_teachers(self) -> None:
        kappas = {part.teacher_kappa for part, _ in self.objectives if Need.TEACHER_SUMS in part.needs}
        if len(kappas) > 1:
            raise ValueError(f"one teacher's sums serve one kappa, and parts want {sorted(kappas)}: give them one")
        if {Need.TEACHER_SUMS, Need.TEACHER_REWARDS} <= self.needs:
            raise ValueError(
                "one part wants the teacher's sums and another its rewards (value_from implicit_reward), and a run "
                "scores one of them: give both the same value_from"
            )

    def _check_labels(self) -> None:
        labelled = [part.name for part, _ in self.objectives if Need.LABELS in part.needs]
        others = [part.name for part, _ in self.objectives if Need.LABELS not in part.needs]
        if labelled and others:
            raise ValueError(
                f"{labelled[0]} reads single responses with labels, and {others[0]} would take all of them for chosen "
                f"ones, the undesirable too: leave {others[0]} out, or take dpo in place of {labelled[0]}"
            )


def _read(part: Any) -> tuple[Objective, float]:
    """An objective and its weight. Raises ValueError, in one line, for what is neither."""
    names = [name for name in part if name != WEIGHT] if isinstance(part, Mapping) else []
    if len(names) != 1:
        raise ValueError(f"a part of a mixture is one objective and its weight, {{dpo: {{}}, weight: 1}}, got {part!r}")
    (name,) = names
    cls = objective_named(name)
    if cls is Mixture:
        raise ValueError("a mixture is no part of a mixture: write its parts beside the others")
    weight = part.get(WEIGHT, 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"the weight of {name} must be a number of at least 0, got {weight!r}")
    settings = part[name] or {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"the settings of {name} are a mapping, {{{name}: {{beta: 0.1}}}}, got {settings!r}")
    own, kinds = settings_names(cls), get_type_hints(cls)
    for setting, value in settings.items():
        if setting not in own:
            has = f"has {', '.join(own)}" if own else "has none"
            raise ValueError(f"{setting} is no setting of {name}, which {has}")
        if not is_of(kinds[setting], value):
            raise ValueError(f"{setting} of {name} must be {in_words(kinds[setting])}, got {value!r}")
    return cls(**settings), float(weight)


def _names(found: Collection[tuple[Objective, float]]) -> str:
    return " and ".join(part.name for part, _ in found) or "a mixture without parts"
