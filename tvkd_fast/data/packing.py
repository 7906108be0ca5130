"""Whole pairs packed into one row of tokens, [prompt | chosen | rejected] each: nothing is padded, no prompt is twice.

Letters: P pairs of a micro-batch, L tokens of its row, N response tokens, M response states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from tvkd_fast.data.batch import PairBatch, labels_of, micro_batches, rewards_of, sampler_logps_of
from tvkd_fast.data.reading.formats import BadPair
from tvkd_fast.data.tokenization import TokenizedPair

Packing = Literal["shared", "unshared", "padded"]


@dataclass(frozen=True)
class MicroBatching:
    """The rule that divides a step's pairs into micro-batches; no pair is ever split.

    - "shared": rows of at most `tokens` tokens, in which a pair's prompt stands once;
    - "unshared": the same with each response behind a prompt of its own, for models that cannot share one;
    - "padded": `pairs` pairs at a time, two padded rows each, for models that take no packed rows.
    """

    packing: Packing = "shared"
    tokens: int = 2048
    pairs: int = 4

    def batches(
        self, dataset: Sequence[TokenizedPair], indices: Sequence[int], *, chosen_only: bool = False
    ) -> Iterator[PairBatch]:
        """The pairs at `indices`, a function of them alone. BadPair where one of them has more than `tokens` tokens."""
        if self.packing == "padded":
            yield from micro_batches(dataset, indices, size=self.pairs, chosen_only=chosen_only)
            return
        bins = first_fit(self._lengths(dataset, indices, chosen_only), self.tokens)
        yield from self._rows(dataset, indices, bins, chosen_only)

    def share(
        self,
        dataset: Sequence[TokenizedPair],
        indices: Sequence[int],
        *,
        rank: int,
        size: int,
        chosen_only: bool = False,
    ) -> list[PairBatch]:
        """The part of one of `size` processes: as many micro-batches as every other's, empty ones where pairs run out.

        Which pairs there are is not the processes' affair, only which rows they lie in.
        """
        if size == 1:
            return list(self.batches(dataset, indices, chosen_only=chosen_only))
        if self.packing == "padded":
            whole = list(self.batches(dataset, indices, chosen_only=chosen_only))
            return self.filled(whole[rank::size], -(-len(whole) // size))
        lengths = self._lengths(dataset, indices, chosen_only)
        fewest = first_fit(lengths, self.tokens)
        count = -(-len(fewest) // size)
        bins = evenly(lengths, count * size)
        if any(sum(lengths[place] for place in places) > self.tokens for places in bins):
            bins = fewest
        mine = [places for places in bins[rank::size] if places]
        return self.filled(list(self._rows(dataset, indices, mine, chosen_only)), count)

    def share_rejected(
        self, dataset: Sequence[TokenizedPair], indices: Sequence[int], *, rank: int, size: int
    ) -> list[PairBatch]:
        """`share` of the rejected responses alone, each behind its prompt."""
        alone, places = [_rejected_alone(dataset[i]) for i in indices], torch.tensor(indices)
        batches = self.share(alone, range(len(alone)), rank=rank, size=size, chosen_only=True)
        return [replace(batch, pairs=places[batch.pairs], sides=(1,)) for batch in batches]

    def _lengths(self, dataset: Sequence[TokenizedPair], indices: Sequence[int], chosen_only: bool) -> list[int]:
        for i in indices:
            self.check_fits(dataset[i], chosen_only=chosen_only)
        shared = self.packing == "shared"
        return [packed_length(dataset[i], shared=shared, chosen_only=chosen_only) for i in indices]

    def _rows(
        self,
        dataset: Sequence[TokenizedPair],
        indices: Sequence[int],
        bins: Sequence[Sequence[int]],
        chosen_only: bool,
    ) -> Iterator[PairBatch]:
        """A packed row a bin, of places in `indices`."""
        for places in bins:
            chunk = [indices[place] for place in places]
            pairs = [dataset[i] for i in chunk]
            yield collate_packed(pairs, chunk, shared=self.packing == "shared", chosen_only=chosen_only)

    def filled(self, batches: list[PairBatch], count: int) -> list[PairBatch]:
        """`count` micro-batches: these, and empty ones, which take part in whatever processes do together."""
        empty = collate_packed([], [])
        if self.packing == "padded":
            empty = replace(empty, layout=None)
        return batches + [empty] * (count - len(batches))

    def check_fits(self, pair: TokenizedPair, *, chosen_only: bool = False) -> None:
        """Raises a BadPair that names the row, where no packed row can hold the pair."""
        tokens = packed_length(pair, shared=self.packing == "shared", chosen_only=chosen_only)
        if self.packing != "padded" and tokens > self.tokens:
            raise BadPair(
                pair.row,
                "the pair is longer than a packed row",
                f"{tokens:,} tokens, {self.tokens:,} in a row",
                "Raise --tokens_per_micro_batch, lower --data.max_length, or leave such pairs out with --data.overlong "
                "drop",
            )

    def capacity(self, batch: PairBatch) -> int:
        """Tokens that would have fitted where this micro-batch is: `num_tokens` over it is the fill."""
        return batch.input_ids.numel() if self.packing == "padded" else self.tokens


def _rejected_alone(pair: TokenizedPair) -> TokenizedPair:
    return replace(pair, chosen_ids=pair.rejected_ids, chosen_ended=pair.rejected_ended, rejected_ids=[], rewards=())


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: places of the lengths, bin by bin, no bin over the budget.

    Each goes into the first bin that it fits into, the longest first and of equal ones the first: no more bins than
    11/9 of the fewest, and one.
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        assert lengths[i] <= budget
        which = next((b for b, free in enumerate(left) if free >= lengths[i]), len(bins))
        if which == len(bins):
            bins.append([])
            left.append(budget)
        bins[which].append(i)
        left[which] -= lengths[i]
    return bins


def evenly(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Places of the lengths in `count` bins: the longest first, each into the bin that has least."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        which = loads.index(min(loads))
        bins[which].append(i)
        loads[which] += lengths[i]
    return bins


def packed_length(pair: TokenizedPair, *, shared: bool = True, chosen_only: bool = False) -> int:
    """Tokens of a pair in a packed row."""
    prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
    if chosen_only:
        return prompt + chosen
    return prompt + chosen + rejected if shared else 2 * prompt + chosen + rejected


def collate_packed(
    pairs: Sequence[TokenizedPair], indices: Sequence[int], *, shared: bool = True, chosen_only: bool = False
) -> PairBatch:
    """The pairs (`indices` are their places in the dataset) as one row [1, L]; without pairs, a row that asks for none.

    An empty row is what a rank goes through that has fewer micro-batches than the others: its parameters are gathered
    and its gradients reduced as everybody's are.
    """
    assert len(pairs) == len(indices)
    ids: list[int] = [] if pairs else [0]
    layout: list[tuple[int, int, int, int]] = [] if pairs else [(0, 1, 1, 1)]
    chosen: list[tuple[int, int, int]] = []
    rejected: list[tuple[int, int, int]] = []
    for pair in pairs:
        start = len(ids)
        ids += pair.prompt_ids + pair.chosen_ids
        border, end = start + len(pair.prompt_ids), len(ids)
        chosen.append((border, border, end))
        if chosen_only:
            layout.append((start, border, end, end))
        elif shared:
            ids += pair.rejected_ids
            layout.append((start, border, end, len(ids)))
            rejected.append((border, end, len(ids)))
        else:
            layout.append((start, border, end, end))
            ids += pair.prompt_ids + pair.rejected_ids
            own = end + len(pair.prompt_ids)
            layout.append((end, own, len(ids), len(ids)))
            rejected.append((own, own, len(ids)))
    # A response's first state is its prompt's last, whatever lies between them in the row.
    states = [[border - 1, *range(start, stop)] for border, start, stop in chosen + rejected]
    ended = [pair.chosen_ended for pair in pairs]
    if not chosen_only:
        ended += [pair.rejected_ended for pair in pairs]
    lengths = tuple(len(of_one) - 1 for of_one in states)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    input_ids = torch.tensor([ids])
    return PairBatch(
        pairs=torch.tensor(indices, dtype=torch.int64),
        input_ids=input_ids,
        predicting=torch.tensor([s for of_one in states for s in of_one[:-1]], dtype=torch.int64),
        labels=input_ids[0, [s for of_one in states for s in of_one[1:]]],
        cu_seqlens=cu_seqlens,
        states=torch.tensor([s for of_one in states for s in of_one], dtype=torch.int64),
        cu_states=cu_seqlens + torch.arange(len(states) + 1),
        ended=torch.tensor(ended, dtype=torch.bool),
        num_tokens=len(ids) if pairs else 0,
        response_lengths=lengths,
        layout=tuple(layout),
        rewards=rewards_of(pairs, chosen_only=chosen_only),
        sampler_logps=sampler_logps_of(pairs, chosen_only=chosen_only),
        sides=(0,) if chosen_only else (0, 1),
        desirable=labels_of(pairs),
    )
