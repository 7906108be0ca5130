"""Scores of pairs, and where they lie in flat arrays.

Letters: P pairs, M response states.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tvkd_fast.data.batch import PairBatch
from tvkd_fast.data.tokenization import TokenizedPair
from tvkd_fast.ops import Head
from tvkd_fast.scoring.kinds import token_kinds


@dataclass(frozen=True)
class Scores:
    """Numbers of consecutive pairs of a dataset, or of a batch of it (then chosen rows first, then rejected)."""

    ref_logps: Tensor | None = None
    """[P, 2] float32 in a dataset, (2P,) in a batch: summed reference log-probabilities."""
    lse: Tensor | None = None
    """(M,) float32: LSE(z) of every response state under the teacher."""
    lse_kappa: Tensor | None = None
    """(M,) float32: LSE(κz); the same tensor as `lse` where κ=1."""
    reward: Tensor | None = None
    """(M,) float32: Σ_{k<t} log π_φ − log π_φref up to every response state, teacher φ and its own reference."""
    teacher_states: Tensor | None = None
    """[P, 2] int64 in a dataset, (2P,) in a batch: states of each response, where the teacher has a tokenizer of its
    own and M counts them; None where they are the policy's."""
    teacher_ended: Tensor | None = None
    """The same shape, bool: whether the response ends in the teacher's tokens."""
    teacher_logps: Tensor | None = None
    """[P, 2] float32 in a dataset, (2P,) in a batch: summed log-probabilities under the teacher, of its own tokens."""
    teacher_hidden: Tensor | None = None
    """[N, D'] of a batch: the teacher's states that predict the response tokens, in the order of its labels."""
    teacher_head: Head | None = None
    """The head of these states, whole and detached."""
    ref_hidden: Tensor | None = None
    """[N, D'] of a batch: the reference's states, likewise."""
    ref_head: Head | None = None
    topk_ids: Tensor | None = None
    """[N, k] int64 of a batch: the teacher's k most probable tokens of each row, most probable first."""
    topk_logps: Tensor | None = None
    """[N, k] float32: their log-probabilities, nats, over the whole vocabulary; what they leave is the tail's."""
    sampled_ids: Tensor | None = None
    """[N, k] int64 of a batch: the distinct tokens among k draws from the teacher, −1 behind the last."""
    sampled_shares: Tensor | None = None
    """[N, k] float32: the share of the draws that fell on each; a row's sum is 1."""
    base_hidden: Tensor | None = None
    """[N, D'] of a batch: those of the teacher's own reference, likewise."""
    base_head: Head | None = None

    def boundaries(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """(2P+1,) boundaries of the responses in the teacher's states, and (2P,) which of them ended."""
        if self.teacher_states is None or self.teacher_ended is None:
            return batch.cu_states, batch.ended
        return torch.cat([self.teacher_states.new_zeros(1), self.teacher_states.cumsum(0)]), self.teacher_ended

    def teacher_lengths(self, batch: PairBatch) -> Tensor:
        """(2P,) tokens of each response as the teacher reads it."""
        return batch.lengths if self.teacher_states is None else self.teacher_states - 1


class ScoreLayout:
    """The places of a pair's numbers in a dataset's flat arrays, from the [P, 2] states of its responses."""

    def __init__(self, states: Tensor) -> None:
        self.num_pairs = states.shape[0]
        self.bounds = torch.cat([torch.zeros(1, dtype=torch.int64), states.flatten().cumsum(0)])

    @classmethod
    def of(cls, dataset: Sequence[TokenizedPair]) -> ScoreLayout:
        return cls(states_of(dataset))

    @property
    def num_states(self) -> int:
        return int(self.bounds[-1])

    def between(self, first: int, last: int) -> int:
        """States of the pairs first..last−1."""
        return int(self.bounds[2 * last] - self.bounds[2 * first])

    def responses(self, pairs: Tensor, sides: Sequence[int] = (0, 1)) -> Tensor:
        """(P,) pairs to the (2P,) places of their responses, in a batch's order: chosen first, then rejected; of those
        `sides` alone that the batch has."""
        return torch.cat([2 * pairs + side for side in sides])

    def states(self, pairs: Tensor) -> Tensor:
        """(P,) pairs to the (M,) places of their responses' states, in a batch's order."""
        return self._places(self.bounds, pairs)

    def tokens(self, pairs: Tensor) -> Tensor:
        """(P,) pairs to the (N,) places of their responses' tokens, of which each has one less than states."""
        return self._places(self.bounds - torch.arange(len(self.bounds)), pairs)

    def _places(self, bounds: Tensor, pairs: Tensor) -> Tensor:
        responses = self.responses(pairs)
        ends = zip(bounds[responses].tolist(), bounds[responses + 1].tolist(), strict=True)
        nothing = torch.empty(0, dtype=torch.int64)
        return torch.cat([nothing, *(torch.arange(start, end) for start, end in ends)])


def states_of(dataset: Sequence[TokenizedPair]) -> Tensor:
    """[P, 2] int64: how many states the responses have."""
    return torch.tensor([[len(p.chosen_ids), len(p.rejected_ids)] for p in dataset], dtype=torch.int64).view(-1, 2) + 1


TOKEN_NAMES = ("teacher_hidden", "topk_ids", "topk_logps", "sampled_ids", "sampled_shares")
"""What has a row per response token, of which a cache keeps a coded form."""

NAMES = tuple(f.name for f in fields(Scores) if f.name not in TOKEN_NAMES and not f.name.endswith(("_hidden", "_head")))
"""The numbers of a response or a state that a cache may hold."""

STATE_NAMES = ("lse", "lse_kappa", "reward")
"""The numbers with one value per state; the others have one per response."""

RESPONSE_NAMES = tuple(name for name in NAMES if name not in STATE_NAMES)


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Names of a manifest's numbers in their order: those of responses and states, then what is kept of tokens."""
    return (*(name for name in NAMES if name in names), *token_kinds(names))
