"""The scores by which a step keeps some of the pairs that it takes (JEST, arXiv 2406.17711; ACID, 2411.18674).

    learnability    L(policy) − L(teacher)
    easy reference  −L(teacher)

L is the objective's loss of a pair. Under it a teacher stands where the policy does, by its log-probabilities of the
pair's responses. A pair's loss depends on no other pair, so that joint sampling is independent.

Letters: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvkd_fast.data import MicroBatching, PairBatch, PairDataset
from tvkd_fast.data.selection import Selection
from tvkd_fast.distributed import World
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.objectives import Objective, PolicyNumbers
from tvkd_fast.ops import unchecked
from tvkd_fast.scoring.scorer import Scorer


@dataclass(frozen=True)
class Selected:
    """What a step keeps of the pairs that it takes."""

    pairs: list[int]
    scores: Tensor
    """(P,) float64 of the pairs that are taken."""
    kept: Tensor
    """(P,) bool"""


@dataclass(frozen=True)
class Selector:
    """Scores pairs by the policy as it is, in one forward without gradients, and keeps some of them.

    Every process asks, and all have the same answer.
    """

    rule: Selection
    policy: PolicyWithHead
    scorer: Scorer
    dataset: PairDataset
    objective: Objective
    batching: MicroBatching
    world: World

    @torch.no_grad()
    def of(self, step: int, pairs: list[int], count: int, *, seed: int) -> Selected:
        """The `count` pairs of `pairs` that a step keeps."""
        mine: dict[int, float] = {}
        batches = self.batching.share(self.dataset, pairs, rank=self.world.rank, size=self.world.size)
        with unchecked():
            for batch in batches:
                scores = self._scores(batch.to(self.world.device))
                mine |= zip(batch.pairs.tolist(), scores.tolist(), strict=True)
        found = {pair: score for of_one in self.world.all_gather(mine) for pair, score in of_one.items()}
        by_place = [found[pair] for pair in pairs]
        places = self.rule.kept(by_place, count, seed=seed, step=step)
        kept = torch.zeros(len(pairs), dtype=torch.bool)
        kept[places] = True
        return Selected([pairs[place] for place in places], torch.tensor(by_place, dtype=torch.float64), kept)

    def _scores(self, batch: PairBatch) -> Tensor:
        """(P,)"""
        scores = self.scorer.of(batch)
        policy = None
        if self.rule.by == "learnability":
            policy = self.objective.numbers(self.policy, scores, batch)
        if not batch.num_pairs:
            return torch.empty(0)
        assert scores.teacher_logps is not None
        teacher = PolicyNumbers(scores.teacher_logps, scores.teacher_lengths(batch))
        found = -self.objective.loss(teacher, scores, batch).losses
        return found if policy is None else self.objective.loss(policy, scores, batch).losses + found


def selection_metrics(selected: list[Selected]) -> dict[str, float]:
    """What steps kept: the share of the pairs that they took, and mean scores of these and of all, in nats of loss."""
    scores, kept = (torch.cat([getattr(one, name) for one in selected]) for name in ("scores", "kept"))
    return {
        "select/kept": float(kept.double().mean()),
        "select/score": float(scores.mean()),
        "select/kept_score": float(scores[kept].mean()),
    }
