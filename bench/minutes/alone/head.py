"""Step 2, the kernels of one head and of the loss behind it.

Letters: N tokens, D hidden, V vocabulary, R rows and C columns of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import triton

from bench.harness.checker import largest, relative
from bench.minutes.alone.problem import NATS, Problem
from bench.minutes.cases import Row, judged
from tvkd_fast.kernels import products
from tvkd_fast.kernels.autotune import tiles
from tvkd_fast.kernels.block_softmax import SCALE, block_exponentials
from tvkd_fast.kernels.blocks import WORKSPACE_BYTES
from tvkd_fast.kernels.dlogits import dlogits
from tvkd_fast.kernels.head_dhidden import _Pass, head_dlogp_dhidden
from tvkd_fast.kernels.head_stats import head_sums, merge_splits
from tvkd_fast.kernels.logit_sums import logit_sums
from tvkd_fast.kernels.preference_epilogue import preference_epilogue
from tvkd_fast.kernels.products import accumulate, product

KAPPA, BETA, SPLITS = 0.5, 0.1, 37


def head_stats(of: Problem) -> Row:
    sums = head_sums(of.hidden, of.head, labels=of.labels, kappa=KAPPA, entropy=True)
    assert sums.target is not None
    assert sums.lse_kappa is not None
    assert sums.entropy is not None
    kept, z = of.kept, of.z[of.kept]
    errors = {
        "lse": largest(sums.lse[kept], z.logsumexp(1)),
        "target": largest(sums.target[kept], z.gather(1, of.own[kept])[:, 0]),
        "lse_kappa": largest(sums.lse_kappa[kept], (KAPPA * z).logsumexp(1)),
        "entropy": largest(sums.entropy[kept], torch.special.entr(z.softmax(1)).sum(1)),
        "ignored rows": largest(sums.lse[~kept], torch.zeros_like(sums.lse[~kept])),
    }
    return judged(errors, NATS)


def merged_splits(of: Problem) -> Row:
    """log Σ_s total_s·exp(max_s) over the splits s of each row."""
    n = of.shape[0]
    maximum = of.memory.copied(torch.randn(SPLITS * n, device=of.hidden.device) * 9)
    total = of.memory.copied(torch.rand(SPLITS * n, device=of.hidden.device) + 0.5)
    sums = {name: of.hidden.new_empty(n, dtype=torch.float32) for name in ("maximum", "log_total")}
    partials = {"maximum": maximum, "log_total": total}
    merge_splits(partials, sums, SPLITS, labels=None, ignore_index=-100, kappa=1.0)
    want = (maximum.double() + total.double().log()).view(SPLITS, n).logsumexp(0)
    return judged({"lse": largest(sums["maximum"].double() + sums["log_total"].double(), want)}, NATS)


def sums_of_products(of: Problem) -> Row:
    """The log-sum-exp of products that the library made."""
    return judged({"lse": largest(logit_sums(of.hidden, of.head).lse, of.z.logsumexp(1))}, NATS)


def dlogits_of_a_block(of: Problem) -> Row:
    """c·(p − δ), and zeros in the rest of the last tiles."""
    n, _, v = of.shape
    config = tiles("dlogits", of.hidden, of.weight, n)
    rows, columns = (triton.cdiv(x, y) * y for x, y in ((n, config.block_m), (v, config.block_n)))
    out, one = of.hidden.new_empty((rows, columns)), of.memory.copied(of.coefficients.new_ones(1))
    coefficients = of.memory.copied(of.coefficients.masked_fill(~of.kept, 0.0))
    block = (of.hidden, of.head, of.labels, of.sums, coefficients, one, out, config)
    column_sums = dlogits(*block, first_column=0, ignore_index=-100, want_bias=True)
    assert column_sums is not None
    want = of.coefficients.double()[:, None] * of.delta
    rest = torch.cat([out[n:].flatten(), out[:, v:].flatten()])
    errors = {
        "dlogits": relative(out[:n, :v], want),
        "column sums": relative(column_sums, want.sum(0)),
        "past the end": largest(rest, torch.zeros_like(rest)),
    }
    return judged(errors, {"dlogits": of.rounding, "column sums": of.rounding, "past the end": 0.0})


LN2 = math.log(2.0)


def _first_block(of: Problem) -> tuple[_Pass, slice, slice]:
    """A frozen head's walk with the exponentials of its only block, before which every row's exponent is −∞."""
    walk = _Pass(of.hidden, of.head, of.labels, -100, None, WORKSPACE_BYTES)
    rows, columns = slice(0, of.shape[0]), slice(0, of.shape[2])
    assert walk.blocks.rows >= rows.stop
    assert walk.blocks.columns >= columns.stop
    walk.held_exponents[0].fill_(-torch.inf)
    walk.held_total.zero_()
    walk._exponentials(rows, columns, walk.held_exponents[0])
    return walk, rows, columns


def exponentials(of: Problem) -> Row:
    """Σ_{j≠y} exp z_j from each tile's exponent k and total, and from the exponentials as they are written."""
    walk, rows, columns = _first_block(of)
    n, v, width = rows.stop, columns.stop, walk.tiles.block_n
    used = triton.cdiv(v, width)
    k, totals = (x.flatten()[: used * n].view(used, n).double() for x in (walk.exponents, walk.totals))
    written = (walk.exponentials[:n, :v].double() / walk.scale).log() + LN2 * k.repeat_interleave(width, 0)[:v].T
    errors = {
        "totals": largest((totals.log() + LN2 * k).logsumexp(0)[of.kept], of.others[of.kept]),
        "exponentials": largest(written.logsumexp(1)[of.kept], of.others[of.kept]),
    }
    return judged(errors, {"totals": NATS, "exponentials": of.rounding})


def rescale(of: Problem) -> Row:
    """The same sum, once all tiles were brought to one exponent."""
    walk, rows, columns = _first_block(of)
    before, after = walk.held_exponents
    walk._rescale(rows, columns, before, after, None)
    base = LN2 * after[rows].double()
    written = walk.exponentials[rows, columns].double().sum(1) / walk.scale
    errors = {
        "total": largest((walk.held_total[rows].double().log() + base)[of.kept], of.others[of.kept]),
        "exponentials": largest((written.log() + base)[of.kept], of.others[of.kept]),
    }
    return judged(errors, {"total": NATS, "exponentials": of.rounding})


def dlogp_dhidden(of: Problem) -> Row:
    """w_y − Σ_j p_j·w_j, by all four kernels of a frozen head."""
    sums, derivatives = head_dlogp_dhidden(of.hidden, of.head, of.labels)
    errors = {
        "lse": largest(sums.lse[of.kept], of.z[of.kept].logsumexp(1)),
        "derivatives": relative(derivatives, -(of.delta @ of.weight.double())),
    }
    return judged(errors, {"lse": NATS, "derivatives": of.rounding})


def triton_product(of: Problem, *, transposed: bool) -> Row:
    """1 + left·right of a block's dlogits, by Triton's kernel where the library would serve too."""
    n, d, v = of.shape
    config = tiles("product", of.hidden, of.weight, n)
    whole = max(config.block_m, config.block_n, config.block_k)
    block = of.hidden.new_zeros(triton.cdiv(n, whole) * whole, triton.cdiv(v, whole) * whole)
    block[:n, :v] = of.delta.to(of.dtype)
    left = of.memory.copied(block)
    right, count = (of.hidden, v) if transposed else (of.weight, n)
    out = of.hidden.new_empty((count, d), dtype=torch.float32)
    one = of.memory.copied(of.coefficients.new_ones(1))
    previous = of.memory.copied(torch.ones_like(out))
    with patch.object(products, "library_sums", lambda *_: False):
        product(left, right, out, config, transposed=transposed, previous=previous, scale=one, last=True)
    operand = block[:n, :v].double()
    return judged({"product": relative(out, 1.0 + (operand.T if transposed else operand) @ right.double())}, 1e-4)


def library_product(of: Problem) -> Row:
    """1 + left·right by the vendor's library, as the backward of 16-bit operands takes it."""
    left, right = of.memory.copied(of.delta.to(of.dtype)), of.weight
    total = of.memory.copied(torch.ones(left.shape[0], right.shape[1], device=left.device))
    accumulate(total, left, right)
    return judged({"product": relative(total, 1.0 + left.double() @ right.double())}, 1e-4)


def exponentials_of_products(of: Problem) -> Row:
    """exp(z − m) of every entry, at the label −T, times a scale; m + log T, and the label's own logit."""
    labels, logits = of.own[:, 0].contiguous(), of.memory.copied(of.z.float())
    out = of.hidden.new_empty(logits.shape)
    found = block_exponentials(logits, of.head, labels, out)
    shift, total = found.shift.double(), found.total.double()
    want = (of.z - shift[:, None]).exp().scatter(1, of.own, -total[:, None])
    errors = {
        "sum": largest(shift + total.log(), of.others),
        "target": largest(found.target, of.z.gather(1, of.own)[:, 0]),
        "exponentials": relative(out.double() / SCALE[of.dtype], want),
    }
    return judged(errors, {"sum": NATS, "target": NATS, "exponentials": of.rounding})


def epilogue(of: Problem) -> Row:
    """DPO's loss −log σ(m), m = β(Σ chosen − Σ rejected), of two ragged pairs, and its derivative by each token."""
    n = of.shape[0] // 4 * 4
    logps = of.memory.copied(-of.coefficients[:n].abs())
    bounds = of.memory.copied(torch.tensor([0, n // 4, n // 2, n // 2 + 1, n], device=logps.device))
    reference = of.memory.copied(logps.new_zeros(4))
    found = preference_epilogue(
        logps,
        bounds,
        ref_logps=reference,
        beta=BETA,
        alpha=0.0,
        gamma=1.0,
        terminal="last_content",
        label_smoothing=0.0,
    )
    lengths = bounds.diff()
    chosen, rejected = torch.stack([x.double().sum() for x in logps.split(lengths.tolist())]).chunk(2)
    margins = BETA * (chosen - rejected)
    slope = -BETA * torch.sigmoid(-margins)
    errors = {
        "losses": largest(found.losses, -torch.nn.functional.logsigmoid(margins)),
        "coefficients": largest(found.coefficients, torch.cat([slope, -slope]).repeat_interleave(lengths)),
    }
    return judged(errors, 1e-5)


HEAD: dict[str, Callable[[Problem], Row]] = {
    "head_stats": head_stats,
    "logit_sums": sums_of_products,
    "dlogits": dlogits_of_a_block,
    "exponentials": exponentials,
    "rescale": rescale,
    "dlogp_dhidden": dlogp_dhidden,
    "product": partial(triton_product, transposed=False),
    "product, transposed": partial(triton_product, transposed=True),
    "block_exponentials": exponentials_of_products,
}
ONCE: dict[str, Callable[[Problem], Row]] = {
    "merge_splits": merged_splits,
    "the library's product into float32": library_product,
    "preference_epilogue": epilogue,
}
"""Without a product of the operands' dtype, or of 16 bits alone."""
