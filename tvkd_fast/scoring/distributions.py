"""What is kept of a teacher's distribution at each response token, computed from its states and head.

Letters: N response tokens, R rows at a time, D hidden, V vocabulary, k entries that are kept of a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from tvkd_fast.data import PairBatch
from tvkd_fast.kernels.hash_uniform import hashed
from tvkd_fast.kernels.products import accumulate, library_sums
from tvkd_fast.ops import Head
from tvkd_fast.ops.inputs import head_input
from tvkd_fast.ops.tiles.exact import accumulation_dtype
from tvkd_fast.scoring.kinds import count_of, kind_of

_ENTRIES = 2**24
"""Logits that are held at once, [R, V]."""
_COLUMNS = 8192
"""Rows of a 16-bit head that a CPU turns into float32 together."""


def kept_of(kinds: Collection[str], batch: PairBatch, hidden: Tensor, head: Head) -> dict[str, Tensor]:
    """The tensors of `Scores` by name that these kinds are, from the states [N, D] that predict the batch's labels.

    Top k come with falling log-probabilities; samples with their shares, distinct ids in rising order.
    """
    found: dict[str, Tensor] = {"teacher_hidden": hidden} if "states" in kinds else {}
    counted = {kind_of(name): count_of(name) for name in kinds if name != "states"}
    for name, k in counted.items():
        if name == "topk" and k > head.vocab_size:
            raise ValueError(f"topk:{k} is more than the teacher's vocabulary of {head.vocab_size}: keep fewer")
    if not counted:
        return found
    hidden, head = head_input(hidden, head)
    n, dtype = len(hidden), accumulation_dtype(hidden.dtype)
    if "topk" in counted:
        found["topk_ids"] = hidden.new_empty((n, counted["topk"]), dtype=torch.int64)
        found["topk_logps"] = hidden.new_empty((n, counted["topk"]), dtype=dtype)
    if "sampled" in counted:
        found["sampled_ids"] = hidden.new_empty((n, counted["sampled"]), dtype=torch.int64)
        found["sampled_shares"] = hidden.new_empty((n, counted["sampled"]), dtype=dtype)
        offsets = token_uniforms(batch)
    for rows, logps in _log_softmaxes(hidden, head):
        if "topk" in counted:
            found["topk_logps"][rows], found["topk_ids"][rows] = logps.topk(counted["topk"], dim=1)
        if "sampled" in counted:
            ids, shares = systematic_samples(logps, offsets[rows], counted["sampled"])
            found["sampled_ids"][rows], found["sampled_shares"][rows] = ids, shares
    return found


def token_uniforms(batch: PairBatch, seed: int = 0) -> Tensor:
    """(N,) float64 in (0, 1), a hash of seed, pair, response and the token's place in it, and of nothing else."""
    responses = torch.cat([2 * batch.pairs, 2 * batch.pairs + 1])[: len(batch.response_lengths)]
    responses = responses.to(batch.labels.device)
    of_response = hashed(responses, 2 * seed).long()
    lengths = batch.lengths
    places = torch.arange(len(batch.labels), device=lengths.device)
    places = places - batch.cu_seqlens[:-1].repeat_interleave(lengths, output_size=len(places))
    mixed = of_response.repeat_interleave(lengths, output_size=len(places)) + places * 0x9E3779B1
    return (hashed(mixed, 2 * seed + 1).double() + 0.5) * 2.0**-32 + 0.5


def systematic_samples(logps: Tensor, offsets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[R, k] distinct ids and the shares of k draws that fell on each, −1 and 0 behind the last.

    The draws are those of systematic sampling, at (i + u)/k of the cumulated probabilities for one u per row: an id of
    probability p is drawn ⌊kp⌋ or ⌈kp⌉ times and k·p times on average, which varies less than independent draws.
    """
    cumulated = logps.double().exp_().cumsum(1)
    at = (torch.arange(k, device=logps.device) + offsets[:, None]) / k * cumulated[:, -1:]
    ids = torch.searchsorted(cumulated, at, right=True).clamp_(max=logps.shape[1] - 1)
    group = torch.nn.functional.pad((ids.diff(dim=1) != 0).long().cumsum(1), (1, 0))
    distinct = torch.full_like(ids, -1).scatter_(1, group, ids)
    counts = torch.zeros_like(ids).scatter_add_(1, group, torch.ones_like(ids))
    return distinct, counts.to(logps.dtype) / k


def _log_softmaxes(hidden: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows and their log-probabilities [R, V], in one workspace that is written over: float32, or float64 of
    float64 states."""
    size = max(1, min(len(hidden), _ENTRIES // head.vocab_size))
    workspace = hidden.new_empty((size, head.vocab_size), dtype=accumulation_dtype(hidden.dtype))
    step = head.vocab_size if head.weight.is_cuda or hidden.dtype == workspace.dtype else _COLUMNS
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        z = workspace[: rows.stop - start]
        h = hidden[rows]
        for first in range(0, head.vocab_size, step):
            columns = slice(first, min(first + step, head.vocab_size))
            weight = head.weight[columns].to(h.dtype)
            if not library_sums(h.device, h.dtype):
                h, weight = h.to(z.dtype), weight.to(z.dtype)
            accumulate(z[:, columns], h, weight.T, fresh=True)
        if head.bias is not None:
            z.add_(head.bias)
        z.mul_(head.logit_scale)
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        yield rows, z.sub_(z.logsumexp(1, keepdim=True))
