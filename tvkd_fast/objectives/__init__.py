"""The training objectives, one file each. Nothing outside this folder knows their names."""

from tvkd_fast.objectives.contract import (
    SCORED,
    TEACHER,
    Factors,
    Need,
    Objective,
    ObjectiveOutput,
    PolicyNumbers,
    known,
)
from tvkd_fast.objectives.divergences.joint_numbers import Joint
from tvkd_fast.objectives.registry import (
    DEFAULT,
    objective,
    objective_named,
    objectives,
    settings_names,
    settings_of,
    shared_settings,
)

__all__ = [
    "DEFAULT",
    "SCORED",
    "TEACHER",
    "Factors",
    "Joint",
    "Need",
    "Objective",
    "ObjectiveOutput",
    "PolicyNumbers",
    "known",
    "objective",
    "objective_named",
    "objectives",
    "settings_names",
    "settings_of",
    "shared_settings",
]
