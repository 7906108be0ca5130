"""Divergences from a kept part of a teacher against their twins on whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from joint_case import JointCase, assert_close
from torch import Tensor

from tvkd_fast.ops import linear_sparse_divergence
from tvkd_fast.ops.joint import listed_op as op
from tvkd_fast.ops.tiles.joint import walk

SHAPE = (19, 7, 11, 53)
FORMS = [("even", "forward_kl"), ("bucket", "forward_kl"), ("bucket", "reverse_kl"), ("bucket", "tvd")]


def kept_of(case: JointCase, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The teacher's top k."""
    q = (case.logits()[1].detach() / temperature).softmax(-1)
    top = q.topk(k)
    return top.indices, top.values.to(torch.promote_types(case.labels.new_empty(0).float().dtype, torch.float32))


def twin(case: JointCase, ids: Tensor, probs: Tensor, tail: str, kind: str, temperature: float) -> Tensor:
    """By the whole q, or by the outcomes "each of the ids" and "any other"."""
    log_p, v = (case.logits()[0] / temperature).log_softmax(-1), case.logits()[0].shape[1]
    there = ids >= 0
    listed = torch.zeros(log_p.shape, dtype=torch.int64).scatter_add(1, ids.clamp_min(0), there.long()) > 0
    q = torch.zeros_like(log_p).scatter_add(1, ids.clamp_min(0), probs.double() * there)
    left = (1 - q.sum(1, keepdim=True)).clamp_min(0)
    if tail == "even":
        q = torch.where(listed, q, left / (v - there.sum(1, keepdim=True)).clamp_min(1))
    else:
        rest = log_p.masked_fill(listed, -torch.inf).logsumexp(1, keepdim=True)
        log_p = torch.cat([log_p.masked_fill(~listed, -torch.inf), rest], 1)
        q = torch.cat([q, left], 1)
    p, log_q = log_p.exp(), q.log()
    if kind == "forward_kl":
        return (q * (log_q - log_p).masked_fill(q == 0, 0.0)).sum(1)
    if kind == "reverse_kl":
        return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(1)
    return 0.5 * (p - q).abs().sum(1)


def check(case: JointCase, ids: Tensor, probs: Tensor, tolerance: float, **options: Any) -> None:
    hidden, head, *_ = case.arguments()
    got = linear_sparse_divergence(hidden, head, ids, probs, **options)
    wide = case.double()
    want = twin(wide, ids, probs, options["tail"], options["kind"], options.get("temperature", 1.0))
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    names = [k for k in ("hidden", "weight", "bias") if case.leaves[k] is not None]
    leaves, others = ([x.leaves[k] for k in names] for x in (case, wide))
    grads = torch.autograd.grad((case.upstream[0] * got.double()).sum(), leaves)  # type: ignore[arg-type]
    wanted = torch.autograd.grad((case.upstream[0] * want).sum(), others)  # type: ignore[arg-type]
    assert_close(grads, wanted, tolerance)


@pytest.mark.parametrize(("tail", "kind"), FORMS)
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "logit_scale": 0.7}], ids=str)
def test_it_is_the_float64_twin(tail: str, kind: str, head: dict[str, Any]) -> None:
    case = JointCase.draw(SHAPE, **head)
    ids, probs = kept_of(case, 6, 1.3)
    check(case, ids, probs, 5e-6, tail=tail, kind=kind, temperature=1.3)


@draws(40)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 8), st.integers(1, 8), st.integers(2, 90)),
    k=st.integers(1, 12),
    rows=st.integers(1, 30),
    floats=st.integers(1, 900),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 2**16),
)
def test_any_shape_in_any_tiles(
    shape: tuple[int, int, int, int], k: int, rows: int, floats: int, form: tuple[str, str], seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "BACKWARD_ROWS", rows)
        patch.setattr(walk, "TILE_FLOATS", floats)
        case = JointCase.draw(shape, dtype=torch.float64, seed=seed)
        ids, probs = kept_of(case, min(k, shape[3] - 1))
        probs = 0.9 * probs
        if k > 2:
            # Some rows have fewer.
            fewer = torch.rand(ids[:, 1:].shape, generator=torch.Generator().manual_seed(seed)) < 0.3
            ids[:, 1:][fewer], probs[:, 1:][fewer] = -1, 0.0
        assume = form[1] == "reverse_kl"
        probs = probs.clamp_min(1e-9) * (ids >= 0) if assume else probs
        check(case, ids, probs, 1e-8, tail=form[0], kind=form[1])


def test_samples_are_their_likelihood() -> None:
    case = JointCase.draw(SHAPE)
    hidden, head, *_ = case.arguments()
    ids = torch.stack([torch.arange(19), torch.arange(19) + 20, torch.full((19,), -1)], 1)
    probs = torch.tensor([0.75, 0.25, 0.0]).expand(19, 3)
    got = linear_sparse_divergence(hidden, head, ids, probs, tail="bucket")
    log_p = case.double().logits()[0].log_softmax(-1)
    likelihood = (probs[:, :2] * log_p.gather(1, ids[:, :2])).sum(1)
    entropy = -(probs[0, :2] * probs[0, :2].log()).sum()
    torch.testing.assert_close(got.double(), -likelihood - entropy, rtol=1e-5, atol=1e-5)


def test_rows_that_are_left_out() -> None:
    case, rows = JointCase.draw(SHAPE), torch.arange(19) % 3 != 0
    hidden, head, *_ = case.arguments()
    kept = kept_of(case, 4)
    got, want = (linear_sparse_divergence(hidden, head, *kept, rows=x) for x in (rows, None))
    assert (got[~rows] == 0).all()
    torch.testing.assert_close(got[rows], want[rows])
    grads = torch.autograd.grad(got.sum(), (hidden, head.weight))
    wanted = torch.autograd.grad(want[rows].sum(), (hidden, head.weight))
    assert_close(grads, [x.double() for x in wanted], 1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tail": ({"tail": "zero"}, "tail must be one of even, bucket"),
    "kind": ({"kind": "jsd"}, "kind must be one of forward_kl, reverse_kl, tvd"),
    "reverse, even": ({"kind": "reverse_kl"}, "take tail='bucket'"),
    "shape": ({"probs": torch.zeros(19, 3)}, r"ids and probs must be \[19, k\]"),
    "log-probabilities": ({"probs": torch.full((19, 2), -0.5)}, "not probabilities.*want exp first"),
    "more than 1": ({"probs": torch.full((19, 2), 0.6)}, "not probabilities, sum 1.2"),
    "NaN": ({"probs": torch.full((19, 2), float("nan"))}, "not probabilities"),
    "of none": ({"ids": torch.tensor([[0, -1]] * 19)}, "0 where the id is -1"),
    "beyond": ({"ids": torch.tensor([[0, 53]] * 19)}, r"ids out of range in row 0: 53 not in \[0, 53\)"),
    "twice": ({"ids": torch.tensor([[5, 5]] * 19)}, "ids name token 5 twice in row 0"),
    "floats": ({"ids": torch.zeros(19, 2)}, "ids are torch.float32"),
    "an impossible tail": (
        {"kind": "reverse_kl", "tail": "bucket", "probs": torch.full((19, 2), 0.5)},
        "reverse_kl is inf in row 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_remedy(name: str) -> None:
    changes, message = REFUSED[name]
    hidden, head, *_ = JointCase.draw(SHAPE).arguments()
    given_: dict[str, Any] = {"ids": torch.tensor([[0, 1]] * 19), "probs": torch.full((19, 2), 0.3)} | changes
    with pytest.raises(ValueError, match=message):
        linear_sparse_divergence(hidden, head, **given_)


def test_opcheck_and_one_graph() -> None:
    case = JointCase.draw(SHAPE)
    hidden, head, *_ = case.arguments()
    ids, probs = kept_of(case, 4)
    torch.library.opcheck(op.listed_op, (hidden, head.weight, head.bias, ids, None, None, 1.0, 1.2))

    def f(x: Tensor) -> Tensor:
        return linear_sparse_divergence(x, head, ids, probs).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(g(hidden), hidden) for g in (compiled, f)))


@pytest.mark.parametrize("rows", [0, 3])
def test_no_tokens_have_no_divergence_and_no_gradient(rows: int) -> None:
    case = JointCase.draw((rows, 7, 11, 53))
    hidden, head, *_ = case.arguments()
    none = torch.zeros(rows, dtype=torch.bool) if rows else None
    ids, probs = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1)
    got = linear_sparse_divergence(hidden, head, ids, probs, rows=none)
    assert (got.shape, bool(got.any())) == ((rows,), False)
    grads = torch.autograd.grad(got.sum(), [hidden, head.weight])
    assert not any(bool(x.any()) for x in grads)
