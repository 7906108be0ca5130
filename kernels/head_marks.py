"""The one-GEMM head's forward: statistics of the vocabulary, and a bit for each softmax entry worth a gradient.

Letters: N tokens, D hidden, V vocabulary, S splits of it, K hot columns, E marked entries, R rows at a time.

A split of the vocabulary cannot know the whole sum that ε is a share of. A floor of it comes first: the log-sum-exp of
K *hot* columns, for K/V of a product. Where a split's own sum is more, that counts. What is marked beside M = {p ≥ ε}
the backward drops, where p is known. Hot columns are not marked: their gradient is the exact one, of ordinary products.

Hot are the batch's labels, which carry the peaks that a floor needs, and then the columns that a sample of rows marks
most. Nothing is remembered from call to call. docs/sparse.md counts what that finds on real states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkd_fast.kernels import blocks
from tvkd_fast.kernels.autotune import tiles
from tvkd_fast.kernels.blocks import slices
from tvkd_fast.kernels.configs import TileConfig, precision
from tvkd_fast.kernels.dice import Dice
from tvkd_fast.kernels.head import Head, HeadSums, MarkRule
from tvkd_fast.kernels.head_stats import head_sums, merge_splits
from tvkd_fast.kernels.launch import launch, operand, target_of
from tvkd_fast.kernels.logits import grouped_tile, logits_tile
from tvkd_fast.kernels.mark_lists import MarkLists, counted, listed

HOT_COLUMNS = 8192
HOT_SHARE = 6
"""At most one column of this many is hot."""
SAMPLE_ROWS = 64
SAMPLE_SHARE = 16
"""At most one row of this many is sampled; the sample takes two products."""

# e^80 is above any sum of a split that a floor beside it could leave worth marking, and is finite.
HIGHEST = tl.constexpr(80.0)
# A floor and a split's sum are rounded: what lies at ε must be marked all the same.
SLACK = 1.0 - 2.0**-10


@dataclass(frozen=True)
class Hot:
    """Columns of the vocabulary whose gradient is exact."""

    columns: Tensor
    """(K,) int64, ascending."""
    cold: Tensor
    """(V,) int8: 1 of a column that is neither hot nor taken out by a bias of −inf."""

    @staticmethod
    def of(columns: Tensor, head: Head) -> Hot:
        cold = torch.ones(head.vocab_size, dtype=torch.int8, device=columns.device)
        if head.bias is not None:
            cold.masked_fill_(head.bias.isneginf(), 0)
        return Hot(columns, cold.index_fill_(0, columns, 0))

    def head(self, head: Head) -> Head:
        """The hot columns' own head, a copy."""
        bias = None if head.bias is None else head.bias[self.columns]
        return Head(head.weight[self.columns], bias, head.softcap, head.logit_scale)

    def cold_words(self, width: int) -> Tensor:
        """(W,) int32: `cold` as bits, as the marks lie."""
        bits = torch.nn.functional.pad(self.cold.int(), (0, 32 * width - len(self.cold))).view(width, 32)
        return (bits << torch.arange(32, device=bits.device, dtype=torch.int32)).sum(1, dtype=torch.int32)

    def local(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels as the hot head counts them: K of a label that is not hot, −100 of one to ignore."""
        count, vocab = len(self.columns), len(self.cold)
        place = torch.full((vocab,), count, device=labels.device, dtype=torch.int64)
        place[self.columns] = torch.arange(count, device=labels.device)
        return place[labels.clamp(0, vocab - 1)].masked_fill(labels == ignore_index, -100)


@triton.jit
def uniform(a, b):
    """u in (0, 1] of two hashes, as `Dice` has it."""
    return (a + b).to(tl.float32) * (2.0**-32) + (0.5 + 2.0**-24)


@triton.jit
def head_marks_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    floors_ptr,
    cold_ptr,
    cold_words_ptr,
    row_dice_ptr,
    column_dice_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    partial_rest_ptr,
    target_ptr,
    words_ptr,
    N,
    V,
    D,
    hidden_stride,
    weight_stride,
    words_stride,
    ignore_index,
    logit_scale,
    softcap,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BULK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. The tile of rows and the split of the vocabulary; a tile of ignored rows costs nothing.
    tiles = tl.cdiv(V, BLOCK_N)
    m, split = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(tiles, SPLIT_TILES), GROUP)
    row = m * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    label = tl.load(labels_ptr + rows, mask=rows < N, other=ignore_index)
    if tl.max((label != ignore_index).to(tl.int32), 0) == 0:
        return
    # Compared as it came: an id that 32 bits cannot hold must not wrap round into the vocabulary.
    label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
    floor = tl.load(floors_ptr + rows, mask=rows < N, other=0.0)
    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    rest = tl.zeros((BLOCK_M,), tl.float32)
    first = split * SPLIT_TILES
    for tile in range(first, tl.minimum(first + SPLIT_TILES, tiles)):
        # 2. Logits of a tile, and z at the label.
        column = tile * BLOCK_N
        z = logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, row, column, N, V, D, hidden_stride, weight_stride, logit_scale, softcap,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BULK, HAS_BIAS, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        columns = column + tl.arange(0, BLOCK_N)
        here = (label >= column) & (label < column + BLOCK_N)
        own = tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), 1)
        tl.store(target_ptr + rows, own, mask=here & (rows < N))
        # 3. The softmax's sum, online, as head_stats_kernel takes it.
        z = tl.where(columns[None, :] < V, z, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(z, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp(running_max - shift)
        e = tl.exp(z - shift[:, None])
        total = total * decay + tl.sum(e, 1)
        running_max = new_max
        # 4. The limit ε·Σ: Σ is not known yet, so the larger of two lower bounds stands for it.
        limit = eps * tl.maximum(total, tl.exp(tl.minimum(floor - shift, HIGHEST)))
        limits = limit[:, None]
        if UNBIASED:
            a = tl.load(row_dice_ptr + rows, mask=rows < N, other=0)
            b = tl.load(column_dice_ptr + columns, mask=columns < V, other=0)
            limits *= uniform(a[:, None], b[None, :])
        # 5. A bit for each entry over the limit, 32 in a word.
        # Reshaped as bits and then shifted: shifted first, every word's 32 numbers would be held at once.
        bits = tl.reshape(e >= limits, (BLOCK_M, BLOCK_N // 32, 32)).to(tl.int32)
        word = tl.sum(bits << tl.arange(0, 32)[None, None, :], 2)
        # 6. The mass of the rest: what is under the limit and in no column whose gradient is exact.
        # Compared once more: masks that were kept from above would fill a scalar register file.
        there = tl.load(cold_ptr + columns, mask=columns < V, other=0).to(tl.float32)
        e *= there[None, :]
        e = tl.where(e < limits, e, 0.0)
        if HAS_SOFTCAP:
            capped = tl.maximum(z, -softcap) / softcap
            e *= 1.0 - capped * capped
        rest = rest * decay + tl.sum(e, 1)
        # 7. The words, less the bits of columns that need none.
        # A label that is not among them is marked after the pass, a row at a time and not once an entry.
        place = column // 32 + tl.arange(0, BLOCK_N // 32)
        word &= tl.load(cold_words_ptr + place)[None, :]
        tl.store(words_ptr + rows.to(tl.int64)[:, None] * words_stride + place[None, :], word, mask=(rows < N)[:, None])
    # 8. Partial sums, for merge_splits.
    place = split.to(tl.int64) * N + rows
    tl.store(partial_max_ptr + place, running_max, mask=rows < N)
    tl.store(partial_sum_ptr + place, total, mask=rows < N)
    tl.store(partial_rest_ptr + place, rest, mask=rows < N)


def mark(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    rule: MarkRule,
    *,
    ignore_index: int = -100,
    config: TileConfig | None = None,
) -> tuple[HeadSums, MarkLists]:
    """`head_sums` with labels, and what a sparse gradient needs of the same pass: one product, and K/V of one.

    Args:
        hidden: [N, D], as `head_sums` takes it; head and labels (N,) too.
        rule: what is kept. Rows over its cap, or all where what is left out passes its limits, are `dense`.
        config: tiles to take in place of the table's.

    Traffic: as `head_sums`, and N·V/8 bytes of bits, R rows at a time, that are read twice more; 4 bytes a mark. Each
    block of rows waits once, for the number of its marks, and the call twice, for whether all is too flat and for its
    dense rows: lists are as long as they are.
    """
    n, vocab = hidden.shape[0], head.vocab_size
    hot = hot_columns(hidden, head, labels, rule, ignore_index=ignore_index)
    config = config or _tiles(hidden, head, unbiased=rule.unbiased)
    floors = _floors(hidden, hot.head(head), labels, ignore_index)
    coins = Dice(rule.seed, torch.arange(n, device=hidden.device), vocab) if rule.unbiased else None
    numbers = [hidden.new_full((n,), math.nan, dtype=torch.float32) for _ in range(4)]
    width = _words(head, config)
    cold = (hot.cold, hot.cold_words(width))
    step = max(1, blocks.WORKSPACE_BYTES // (4 * width) // config.block_m) * config.block_m
    words = hidden.new_empty((min(n, step), width), dtype=torch.int32)
    wanted, known = labels != ignore_index, labels.clamp(0, vocab - 1)
    # A label that is hot, or nobody's, needs no bit.
    own = hot.cold[known].bool() & wanted & (labels == known)
    alone, dense, counts = torch.zeros_like(own), torch.zeros_like(own), torch.zeros_like(labels)
    columns = []
    for rows in slices(n, step):
        there = labels[rows]
        dice = (None, None) if coins is None else (coins.a[rows], coins.b)
        here = [x[rows] for x in numbers]
        _marks(
            hidden[rows], head, there, floors[rows], cold, dice, here, words, rule, config, ignore_index=ignore_index
        )  # fmt: skip
        alone[rows] = _mark_labels(words, known[rows], own[rows])
        counts[rows] = counted(words, there, ignore_index)
        dense[rows] = counts[rows] - own[rows].long() > rule.row_cap
        columns.append(listed(words, counts[rows].masked_fill(dense[rows], 0)))
    maximum, log_total, log_rest, target = numbers
    sums = HeadSums(maximum, log_total, target=target)
    # The rest holds the labels that were not marked of themselves.
    own_mass = sums.logps.exp()
    if head.softcap is not None:
        own_mass *= 1.0 - (target / head.softcap) ** 2
    tail = (log_rest - maximum - log_total).exp() - torch.where(alone, own_mass, 0.0)
    tail = tail.clamp_min(0.0).masked_fill(~wanted, 0.0)
    return sums, MarkLists.of(columns, counts, own, dense, tail, wanted, hot.columns, rule)


def _mark_labels(words: Tensor, labels: Tensor, own: Tensor) -> Tensor:
    """Set each row's own bit where `own`; (R,) bool, where it was not set before."""
    which = (labels // 32)[:, None]
    bit = (own.int() << (labels % 32).int())[:, None]
    found = words[: len(labels)].gather(1, which)
    words[: len(labels)].scatter_(1, which, found | bit)
    return ((found & bit) == 0)[:, 0] & own


def hot_columns(hidden: Tensor, head: Head, labels: Tensor, rule: MarkRule, *, ignore_index: int) -> Hot:
    """The batch's labels, then what a sample of rows marks most, then the columns that come first: K of them."""
    vocab = head.vocab_size
    known = torch.where((labels < 0) | (labels >= vocab) | (labels == ignore_index), vocab, labels)
    present = known.new_zeros(vocab + 1).index_fill_(0, known, 1)[:-1]
    sampled = _sampled(hidden, head, labels, rule, ignore_index)
    if head.bias is not None:
        # But for labels: of one that a bias takes out, the δ is left, and a cold column has no entry for it.
        sampled.masked_fill_(head.bias.isneginf() & (present == 0), -1)
    first = rank(present, sampled).topk(min(HOT_COLUMNS, vocab // HOT_SHARE)).indices
    return Hot.of(first.sort().values, head)


def rank(present: Tensor, sampled: Tensor) -> Tensor:
    """(V,) int64, the more the hotter: 1 of a label, then how many of SAMPLE_ROWS mark it, then the lower column.

    No two are equal, so that the choice is the same each time.
    """
    vocab = len(present)
    lower = torch.arange(vocab - 1, -1, -1, device=present.device)
    return (present * (SAMPLE_ROWS + 1) + sampled) * vocab + lower


def _sampled(hidden: Tensor, head: Head, labels: Tensor, rule: MarkRule, ignore_index: int) -> Tensor:
    """(V,) int64: how many of some rows, evenly spaced among those with a label, have p ≥ ε."""
    n = hidden.shape[0]
    ignored = labels == ignore_index
    wanted = ignored.sort(stable=True).indices
    spaced = torch.arange(min(SAMPLE_ROWS, n // SAMPLE_SHARE), device=labels.device)
    rows = wanted[spaced * (n - ignored.sum()) // max(len(spaced), 1)]
    if not len(rows):
        return labels.new_zeros(head.vocab_size)
    states, there = hidden[rows], labels[rows]
    lse = head_sums(states, head, labels=there, ignore_index=ignore_index).lse
    numbers = [torch.empty_like(lse) for _ in range(4)]
    config = _tiles(states, head, unbiased=False)
    words = hidden.new_zeros((len(rows), _words(head, config)), dtype=torch.int32)
    none = Hot.of(labels.new_empty(0), head)
    cold = (none.cold, none.cold_words(words.shape[1]))
    _marks(states, head, there, lse, cold, (None, None), numbers, words, rule, config, ignore_index=ignore_index)
    bits = torch.stack([((words >> bit) & 1).sum(0) for bit in range(32)], 1)
    return bits.flatten()[: head.vocab_size]


def _words(head: Head, config: TileConfig) -> int:
    """W: words of whole tiles."""
    return triton.cdiv(head.vocab_size, config.block_n) * config.block_n // 32


def _tiles(hidden: Tensor, head: Head, *, unbiased: bool) -> TileConfig:
    heavy = head.softcap is not None or unbiased
    return tiles("head_marks", hidden, head.weight, hidden.shape[0], heavy=heavy, bias=head.bias is not None)


def _floors(hidden: Tensor, head: Head, labels: Tensor, ignore_index: int) -> Tensor:
    """(N,) log-sum-exp of the hot columns; −inf where there are none."""
    if not head.vocab_size:
        return hidden.new_full((hidden.shape[0],), -math.inf, dtype=torch.float32)
    return head_sums(hidden, head, labels=labels, ignore_index=ignore_index).lse


def _marks(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    floors: Tensor,
    cold: tuple[Tensor, Tensor],
    dice: tuple[Tensor | None, Tensor | None],
    numbers: list[Tensor],
    words: Tensor,
    rule: MarkRule,
    config: TileConfig,
    *,
    ignore_index: int,
) -> None:
    """One block of rows: bits into `words`; max z, log Σ, log of the rest's sum and z at the label into `numbers`.

    cold: (V,) int8 and the same as words; dice: both hashes of an unbiased tail's, or None.
    """
    (n, d), weight = hidden.shape, head.weight
    splits = triton.cdiv(triton.cdiv(head.vocab_size, config.block_n), config.split_tiles)
    partial_max, partial_sum, partial_rest = hidden.new_empty((3, splits * n), dtype=torch.float32)
    maximum, log_total, log_rest, target = numbers
    launch(
        head_marks_kernel,
        triton.cdiv(n, config.block_m) * splits,
        on=hidden,
        options=config.options,
        hidden_ptr=operand(hidden, (config.block_m, config.block_k), config),
        weight_ptr=operand(weight, (config.block_n, config.block_k), config),
        bias_ptr=head.bias,
        labels_ptr=labels,
        floors_ptr=floors,
        cold_ptr=cold[0],
        cold_words_ptr=cold[1],
        row_dice_ptr=dice[0],
        column_dice_ptr=dice[1],
        partial_max_ptr=partial_max,
        partial_sum_ptr=partial_sum,
        partial_rest_ptr=partial_rest,
        target_ptr=target,
        words_ptr=words,
        N=n,
        V=head.vocab_size,
        D=d,
        hidden_stride=hidden.stride(0),
        weight_stride=weight.stride(0),
        words_stride=words.stride(0),
        ignore_index=ignore_index,
        logit_scale=head.logit_scale,
        softcap=head.softcap or 1.0,
        eps=rule.eps * SLACK,
        **config.switches,
        SPLIT_TILES=config.split_tiles,
        EVEN_K=d % config.block_k == 0,
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        UNBIASED=dice[0] is not None,
        PRECISION=precision(hidden.dtype, target_of(hidden)),
    )
    # log Σ rest is what the merge calls LSE(κz) at κ = 1: a second sum, taken from the same maximum.
    merge_splits(
        {"maximum": partial_max, "log_total": partial_sum, "lse_kappa": partial_rest},
        {"maximum": maximum, "log_total": log_total, "lse_kappa": log_rest},
        splits,
        labels=labels,
        ignore_index=ignore_index,
        kappa=1.0,
    )
