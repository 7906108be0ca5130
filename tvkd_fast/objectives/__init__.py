"""Objectives: what a policy is trained for. One file each; nothing outside this folder knows their names."""

from tvkd_fast.objectives.contract import TEACHER, Need, Objective, ObjectiveOutput, PolicyNumbers, known
from tvkd_fast.objectives.registry import DEFAULT, as_objective, objective, objective_named, objectives

__all__ = [
    "DEFAULT",
    "TEACHER",
    "Need",
    "Objective",
    "ObjectiveOutput",
    "PolicyNumbers",
    "as_objective",
    "known",
    "objective",
    "objective_named",
    "objectives",
]
