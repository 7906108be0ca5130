"""Whether an objective fits the models, the labels, the selection and the rewards that a command is given."""

from __future__ import annotations

from tvkd_fast.objectives.contract import Need, Objective


def check_teacher_reference(teacher: str | None, teacher_reference: str | None, objective: Objective) -> None:
    """Raise ValueError where a teacher's own reference is wanted and missing, or given and not wanted."""
    base, rewards = Need.BASE_STATES in objective.needs, Need.TEACHER_REWARDS in objective.needs
    if teacher is not None and (rewards or base) and teacher_reference is None:
        what = objective.name if base else "value_from='implicit_reward'"
        raise ValueError(
            f"{what} is what the teacher gained over its own reference, the model that it was before DPO: set "
            "--teacher_reference"
        )
    if teacher_reference is not None and not ((rewards or base) and teacher is not None):
        raise ValueError(
            "--teacher_reference serves --teacher, by --loss.value_from implicit_reward or --loss.base: set all or none"
        )


def check_labels(unpair: bool, objective: Objective) -> None:
    """Raise ValueError where labelled responses are made of pairs, and the objective reads no labels."""
    if unpair and Need.LABELS not in objective.needs:
        raise ValueError(f"{objective.name} reads no labels: leave --data.unpair out, or take --objective kto")


def check_selection(by: str, objective: Objective) -> None:
    """Raise ValueError where pairs are to be selected by a loss that a pair has not by itself."""
    needs = objective.needs
    own = objective.per_pair and Need.REJECTED in needs and not objective.joint and not objective.alone
    if by != "no" and own and Need.COLLISIONS in needs:
        raise ValueError(
            f"--data.select {by} asks for a pair's loss under the teacher, and {objective.name} weighs pairs by the "
            "policy's whole distributions: leave it out, or choose another --objective, such as dpo"
        )
    if by != "no" and not own:
        raise ValueError(
            f"--data.select {by} goes by a pair's own loss from its log-probabilities, and {objective.name} has none: "
            "leave it out, or choose another --objective"
        )


def check_rewards(names: list[str] | None, objective: Objective) -> None:
    """Raise ValueError where rewards are named that the objective does not read, or more than it takes."""
    if names is None:
        return
    if Need.REWARDS not in objective.needs:
        raise ValueError(f"{objective.name} reads no rewards: leave --data.rewards out, or choose another --objective")
    if len(names) > 1 and not objective.several_rewards:
        raise ValueError(
            f"{objective.name} reads one reward and --data.rewards names {len(names)}: name one, such as [{names[0]}]"
        )
