"""SFT: supervised fine-tuning on the chosen responses.

Letters: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvkd_fast.data import PairBatch
from tvkd_fast.objectives.contract import Need, Objective, ObjectiveOutput, PolicyNumbers
from tvkd_fast.objectives.registry import objective
from tvkd_fast.scoring.layout import Scores


@objective("sft")
@dataclass(kw_only=True)
class SFT(Objective):
    """−log π(y_w), divided by tokens and not by pairs."""

    divided_by = "chosen_tokens"
    linear = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def loss(self, policy: PolicyNumbers, scores: Scores, batch: PairBatch) -> ObjectiveOutput:
        return ObjectiveOutput(-policy.logps[: batch.num_pairs])

    def describe(self) -> str:
        return "mean negative log-likelihood of the chosen responses"
