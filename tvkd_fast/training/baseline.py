"""The KL divergence from which responses with labels are measured, the same for a whole step.

Letters: P responses of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tvkd_fast.data import PairBatch
from tvkd_fast.distributed import World
from tvkd_fast.losses import segment_sums
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.scoring import Scorer


@torch.no_grad()
def with_baseline(
    policy: PolicyWithHead,
    scorer: Scorer,
    batches: Sequence[PairBatch],
    mismatched: Sequence[PairBatch],
    world: World,
) -> list[PairBatch]:
    """`batches` with z = max(0, mean of log π_θ(y'|x) − log π_ref(y'|x)), nats, over the responses y' to other prompts
    in every process's `mismatched`: KTO's estimate of KL(π_θ‖π_ref)."""
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in mismatched:
        ref_logps = scorer.of(batch).ref_logps
        logps = segment_sums(policy(batch), batch.cu_seqlens)
        if batch.num_pairs:
            assert ref_logps is not None
            ratios = (logps - ref_logps).double()
            total += torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))])
    ratio_sum, count = world.all_reduce(total)
    baseline = (ratio_sum / count).clamp(min=0)
    return [replace(batch, baseline=baseline) for batch in batches]
