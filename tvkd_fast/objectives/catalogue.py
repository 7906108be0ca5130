"""All objectives in one table: their formulas, what they need, what they cost, and where they were read."""

from __future__ import annotations

import inspect

from tvkd_fast.objectives.contract import NOT_CACHED, TEACHER, Need, Objective
from tvkd_fast.objectives.divergences.joint_numbers import KEPT, TOP_GAP, Joint, walks_of
from tvkd_fast.objectives.registry import DEFAULT, objectives

COLUMNS = (
    "name",
    "loss per pair",
    "needs",
    "settings and defaults",
    "bytes on disk",
    "products",
    "passes",
    "source",
)
_IN_WORDS = {
    Need.REJECTED: "rejected",
    Need.REFERENCE: "reference",
    Need.TEACHER_SUMS: "teacher's sums",
    Need.TEACHER_REWARDS: "teacher's rewards",
    Need.TEACHER_LOGPS: "teacher's log-probabilities",
    Need.REWARDS: "rewards of the data",
    Need.LABELS: "labels",
    Need.TEACHER_STATES: "teacher's states",
    Need.TEACHER_TOP_K: "teacher's top k",
    Need.TEACHER_SAMPLES: "teacher's samples",
    Need.REFERENCE_STATES: "reference's states",
    Need.BASE_STATES: "states of the teacher's reference",
    Need.SAMPLER_LOGPS: "sampler's log-probabilities",
}
_KEPT_PER_TOKEN = {
    Need.TEACHER_SUMS: "4",
    Need.TEACHER_REWARDS: "4",
    Need.TEACHER_STATES: "D′ + 4",
    Need.TEACHER_TOP_K: "304",
    Need.TEACHER_SAMPLES: "251 at most",
}
_KEPT_PER_RESPONSE = {Need.REFERENCE: 4, Need.TEACHER_LOGPS: 4}
_MODELS = (
    {Need.REFERENCE, Need.REFERENCE_STATES},
    TEACHER - {Need.BASE_STATES},
    {Need.TEACHER_REWARDS, Need.BASE_STATES},
)
"""What each of reference, teacher and teacher's reference is run for."""
_PASSES_OVER_OTHERS = 2
"""Passes of policy and reference over responses to other prompts, without a gradient."""


def table() -> str:
    """The table in Markdown, a line per objective under its default settings, as docs/objectives.md has it."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(row, objectives().values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def row(cls: type[Objective]) -> tuple[str, ...]:
    """The cells of one objective under its default settings."""
    made = cls()
    needs = [need for need in Need if need in made.needs]
    name = f"`{cls.name}`{' (default)' if cls.name == DEFAULT else ''}"
    cells = (
        name,
        formula(cls),
        ", ".join(_IN_WORDS[need] for need in needs if need in _IN_WORDS) or "–",
        ", ".join(f"`{setting}` {_value(value)}" for setting, value in made.settings().items()) or "–",
        _on_disk(made, needs),
        products(made),
        str(
            1
            + sum(not of_model.isdisjoint(needs) for of_model in _MODELS)
            + _PASSES_OVER_OTHERS * (Need.LABELS in needs)
        ),
        _link(cls.source),
    )
    return tuple(cell.replace("|", r"\|") for cell in cells)


def formula(cls: type[Objective]) -> str:
    """The first paragraph of its docstring, without the full stop."""
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")


def products(objective: Objective) -> str:
    """The head's products per step of tokens × hidden × vocabulary under exact gradients: forward, dH and dW; one more
    where the logits are computed again in the backward, one for Σp², and one for responses to other prompts. A frozen
    head counts r, its width over the policy's, a product; what is over one of two responses counts half."""
    own, frozen, with_logps = 0.0, 0.0, False
    for walk, members in walks_of(objective.joint).items():
        # Nothing is handed down to the log-probabilities beside these two.
        if walk.output == TOP_GAP:
            own, frozen, with_logps = own + 2, frozen + 1, True
            continue
        if walk.output in KEPT:
            own, with_logps = own + 4 * (1.0 if _of_all(walk, objective) else 0.5) + 1, True
            continue
        known = set(members) <= set(objective.linear_joint)
        of_all = _of_all(walk, objective)
        alone = walk.is_alone or not of_all or walk.temperature != 1.0 or with_logps
        # Some are computed again in the backward, whatever is known of them.
        again = walk.is_alone or not known or not (alone or objective.linear)
        share = 1.0 if of_all else 0.5
        own += share * (3 + again)
        frozen += share * len(walk.of) * (1 + again)
        with_logps |= not alone
    if not with_logps:
        own += 3 if objective.per_pair else 4
    if Need.SAMPLER_LOGPS in objective.needs:
        # The frozen models' log-probabilities of the samples.
        frozen += len(objective.needs & {Need.TEACHER_STATES, *NOT_CACHED})
    own += objective.more_products + len({Need.COLLISIONS, Need.LABELS} & objective.needs)
    if objective.teacher_lora is not None:
        # The gradient of its states.
        frozen *= 1.5
    return f"{own:g}" + (f" + {'' if frozen == 1 else f'{frozen:g}'}r" if frozen else "")


def _of_all(walk: Joint, objective: Objective) -> bool:
    """Whether a walk is over all responses that are computed."""
    return walk.responses == "both" or Need.REJECTED not in objective.needs


def _on_disk(objective: Objective, needs: list[Need]) -> str:
    new = objective.changes_input or objective.on_policy or objective.teacher_lora is not None
    if new or not (NOT_CACHED | {Need.SAMPLER_LOGPS}).isdisjoint(needs):
        return "not cached"
    tokens = [_KEPT_PER_TOKEN[need] for need in needs if need in _KEPT_PER_TOKEN]
    response = sum(_KEPT_PER_RESPONSE.get(need, 0) for need in needs)
    parts = [f"{size} per token" for size in tokens] + [f"{response} per response"] * bool(response)
    return ", ".join(parts) or "0"


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " and ".join(next(iter(part)) for part in value)
    return "–" if value is None else str(value).lower()


def _link(source: str) -> str:
    kind, _, number = source.partition(" ")
    return f"[{number}](https://arxiv.org/abs/{number})" if kind == "arXiv" else source
