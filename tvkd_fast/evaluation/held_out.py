"""A policy on held-out responses with labels: whether rewards have their labels' signs.

Letters: P rows, each a response with a label and a response to another prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.data import MicroBatching, PairBatch, PairDataset, collate_packed
from tvkd_fast.distributed import World
from tvkd_fast.evaluation.evaluate import Evaluation, evaluate, half_width, measure
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.objectives import Factors, Objective, PolicyNumbers
from tvkd_fast.scoring import Scores
from tvkd_fast.scoring.scorer import Scorer


def evaluate_held_out(policy: PolicyWithHead, dataset: PairDataset, **options: Any) -> Evaluation:
    """`evaluate` of pairs, `evaluate_labelled` of responses with labels; `options` are those of both."""
    return (evaluate if dataset[0].desirable is None else evaluate_labelled)(policy, dataset, **options)


@torch.no_grad()
def evaluate_labelled(
    policy: PolicyWithHead,
    dataset: PairDataset,
    *,
    scorer: Scorer | None = None,
    objective: Objective | None = None,
    batching: MicroBatching | None = None,
    world: World | None = None,
) -> Evaluation:
    """Figures of responses with labels: `accuracy`, the share whose ρ − z has the label's sign, and `margin`, the mean
    ρ of desirable responses less that of the others, nats; z = max(0, mean ρ of responses to other prompts).

    The loss is the objective's, with this z, where it follows from log-probabilities alone. Raises
    ValueError where there is no reference, which ρ is measured from.
    """

    def columns(batch: PairBatch) -> Tensor:
        ref_logps = None if scorer is None else scorer.of(batch).ref_logps
        if ref_logps is None:
            raise ValueError("responses with labels are judged by rewards over a reference: give --reference")
        logps = segment_sums(policy(batch), batch.cu_seqlens)
        if batch.num_pairs == 0:
            return logps.new_empty(6, 0)
        labels, lengths = batch.desirable, batch.lengths
        assert labels is not None
        return torch.stack([x.double() for x in (*logps.chunk(2), *ref_logps.chunk(2), labels, lengths.chunk(2)[0])])

    logps, others, ref_logps, ref_others, labels, lengths = measure(
        policy, dataset, columns, batching=batching, world=world
    )
    desirable, baseline = labels > 0, (others - ref_others).mean().clamp(min=0)
    ratios = logps - ref_logps
    above, below = ratios[desirable], ratios[~desirable]
    right = torch.where((ratios - baseline).isnan(), torch.nan, ((ratios > baseline) == desirable).double())
    figures = Evaluation(
        pairs=len(dataset),
        accuracy=float(right.mean()),
        accuracy_ci=half_width(right),
        margin=float(above.mean() - below.mean()),
        margin_ci=float(torch.tensor([half_width(above), half_width(below)]).norm()),
    )
    if objective is None or objective.joint:
        return figures
    rows = replace(
        collate_packed([], []), pairs=torch.arange(len(dataset)), desirable=desirable, baseline=baseline, sides=(0,)
    )
    out = objective.loss(PolicyNumbers(logps, lengths.long()), Scores(ref_logps), rows)
    tokens = float(lengths.sum())
    factors = Factors(*(1 / torch.tensor([len(dataset), tokens, tokens], dtype=torch.float64)))
    return replace(figures, loss=float(objective.total(out, factors)))
