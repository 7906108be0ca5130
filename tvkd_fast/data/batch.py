"""A micro-batch of pairs as tensors. The shift between states and the tokens they predict happens here, once.

Letters: P pairs, L row length, N response tokens, M response states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tvkd_fast.data.tokenization import TokenizedPair
from tvkd_fast.transfer import to_device

Layout = tuple[tuple[int, int, int, int], ...]
"""For each pair of a packed row, the starts of its prompt, chosen and rejected response, and its end."""


@dataclass(frozen=True)
class PairBatch:
    """Padded: 2P rows [prompt | response], chosen rows first, then the rejected ones in the same order; P rows in SFT.
    Packed, where there is a `layout`: one row, [prompt | chosen | rejected] pair after pair.

    A response of T tokens has T predicting states s_0..s_{T−1} and T+1 states in all; s_0 is the prompt's last one.
    """

    pairs: Tensor
    """(P,) int64: which pairs of the dataset these are; on the host."""
    input_ids: Tensor
    """[2P, L] int64, padded on the right: a causal model's states before the padding do not see it. Packed: [1, L]."""
    predicting: Tensor
    """(N,) int64 flat positions in `input_ids` of the states that predict `labels`."""
    labels: Tensor
    """(N,) int64 response tokens."""
    cu_seqlens: Tensor
    """(2P+1,) int64 boundaries of the responses in N."""
    states: Tensor
    """(M,) int64 flat positions of every response state, s_0 and s_T included: M = N + 2P. Where a prompt is shared its
    last state is s_0 of both responses, and stands here twice."""
    cu_states: Tensor
    """(2P+1,) int64 boundaries of the responses in M."""
    ended: Tensor
    """(2P,) bool: the response ends with its end-of-sequence token, and was not cut off."""
    num_tokens: int
    """Tokens of all rows, without padding."""
    response_lengths: tuple[int, ...]
    """(2P,) tokens of each response, on the host."""
    layout: Layout | None = None
    rewards: Tensor | None = None
    """[K, 2P] float32 numbers of the responses by each of K columns of the data, where they were read."""
    sampler_logps: Tensor | None = None
    """(N,) float64 log-probabilities of `labels` under the law that they were sampled from, of single responses that
    have them."""
    sides: tuple[int, ...] = (0, 1)
    """Which responses of each pair it holds: 0 the chosen, 1 the rejected one."""
    desirable: Tensor | None = None
    """(P,) bool labels of the chosen responses, where the rejected ones are of other prompts."""
    baseline: Tensor | None = None
    """() nats ≥ 0: KL(π_θ‖π_ref), estimated from a whole step's responses to other prompts, under `Need.LABELS`."""
    partners: Tensor | None = None
    """(rows·L,) int64 flat positions in `input_ids`: the token whose embedding is mixed into that of each, where
    embeddings are mixed."""
    shares: Tensor | None = None
    """(rows·L,) float32: the share of a token's own embedding in the mixture, 1 where nothing is mixed into it."""

    @property
    def attention_mask(self) -> None:
        """Nothing that a causal model could see is to be hidden from it: padding stands behind the rows."""

    @property
    def num_pairs(self) -> int:
        return self.pairs.shape[0]

    @property
    def chosen_tokens(self) -> int:
        """The tokens of the chosen responses, which come first."""
        return sum(self.response_lengths[: self.num_pairs])

    @property
    def lengths(self) -> Tensor:
        """(2P,) int64 tokens of each response; (P,) in SFT."""
        return self.cu_seqlens.diff()

    @property
    def length_differences(self) -> Tensor:
        """(P,) chosen length − rejected length, in tokens."""
        chosen, rejected = self.lengths.chunk(2)
        return chosen - rejected

    def to(self, device: torch.device | str) -> PairBatch:
        """The batch on a device, without waiting for it; its pairs stay where scores are looked up by them."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name != "pairs":
                moved[field.name] = to_device(value, device)
        return replace(self, **moved)


def collate_pairs(
    pairs: Sequence[TokenizedPair], indices: Sequence[int], *, pad_id: int = 0, chosen_only: bool = False
) -> PairBatch:
    """The pairs (`indices` are their places in the dataset) as one padded batch."""
    assert len(pairs) == len(indices) > 0
    rows = [(p.prompt_ids, p.chosen_ids) for p in pairs]
    ended = [p.chosen_ended for p in pairs]
    if not chosen_only:
        rows += [(p.prompt_ids, p.rejected_ids) for p in pairs]
        ended += [p.rejected_ended for p in pairs]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    states: list[int] = []
    predicting: list[int] = []
    labels: list[int] = []
    for i, (prompt, response) in enumerate(rows):
        ids = prompt + response
        input_ids[i, : len(ids)] = torch.tensor(ids)
        s_0 = i * length + len(prompt) - 1
        states += range(s_0, s_0 + len(response) + 1)
        predicting += range(s_0, s_0 + len(response))
        labels += response
    lengths = tuple(len(response) for _, response in rows)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return PairBatch(
        pairs=torch.tensor(indices),
        input_ids=input_ids,
        predicting=torch.tensor(predicting),
        labels=torch.tensor(labels),
        cu_seqlens=cu_seqlens,
        states=torch.tensor(states),
        cu_states=cu_seqlens + torch.arange(len(rows) + 1),
        ended=torch.tensor(ended),
        num_tokens=sum(len(prompt) + len(response) for prompt, response in rows),
        response_lengths=lengths,
        rewards=rewards_of(pairs, chosen_only=chosen_only),
        sampler_logps=sampler_logps_of(pairs, chosen_only=chosen_only),
        sides=(0,) if chosen_only else (0, 1),
        desirable=labels_of(pairs),
    )


def labels_of(pairs: Sequence[TokenizedPair]) -> Tensor | None:
    """(P,) bool labels; None where the pairs have none."""
    if not pairs or pairs[0].desirable is None:
        return None
    return torch.tensor([bool(pair.desirable) for pair in pairs])


def rewards_of(pairs: Sequence[TokenizedPair], *, chosen_only: bool) -> Tensor | None:
    """[K, 2P] rewards of the pairs' responses, chosen ones first; None where they have none."""
    if not pairs or not pairs[0].rewards:
        return None
    sides = 1 if chosen_only else 2
    columns = zip(*(pair.rewards for pair in pairs), strict=True)
    return torch.tensor([[one[side] for side in range(sides) for one in column] for column in columns])


def sampler_logps_of(pairs: Sequence[TokenizedPair], *, chosen_only: bool) -> Tensor | None:
    """(N,) log-probabilities of single responses under the law that they were sampled from; None where one has none."""
    if not pairs or not chosen_only or any(not pair.sampler_logps for pair in pairs):
        return None
    return torch.tensor([logp for pair in pairs for logp in pair.sampler_logps], dtype=torch.float64)


def micro_batches(
    dataset: Sequence[TokenizedPair],
    indices: Sequence[int],
    *,
    size: int,
    pad_id: int = 0,
    chosen_only: bool = False,
) -> Iterator[PairBatch]:
    """These pairs in micro-batches of at most `size`, pairs of like length together so that padding is little."""
    by_length = sorted(indices, key=lambda i: (_row_length(dataset[i]), i))
    for start in range(0, len(by_length), size):
        chunk = by_length[start : start + size]
        yield collate_pairs([dataset[i] for i in chunk], chunk, pad_id=pad_id, chosen_only=chosen_only)


def _row_length(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
