"""The expected score against its float64 twin, and against the KLs that it is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joint_case import JointCase, assert_close
from torch import Tensor

from tvkd_fast.ops import Head, linear_expected_score, reference
from tvkd_fast.ops.joint import expected_score as op
from tvkd_fast.ops.joint.divergence import linear_joint
from tvkd_fast.ops.tiles import native
from tvkd_fast.ops.tiles.joint import walk

SHAPE = (21, 7, 11, 53)
Heads = list[tuple[float, Tensor, Head]]


def heads_of(case: JointCase) -> Heads:
    """A teacher, a base of another width with a softcap, and a third at a factor that is no sign."""
    draw = torch.Generator().manual_seed(9)
    _, _, teacher_hidden, teacher = case.arguments()
    sizes = ((SHAPE[0], 5), (SHAPE[3], 5), (SHAPE[3],))
    states, weight, bias = (torch.randn(*size, generator=draw).to(teacher_hidden.dtype) for size in sizes)
    return [
        (1.0, teacher_hidden, teacher),
        (-1.0, states, Head(weight, bias, softcap=2.5)),
        (0.4, states.flip(0), Head(weight, logit_scale=0.3)),
    ]


def twin(case: JointCase, heads: Heads, temperature: float) -> Tensor:
    log_p = (case.logits()[0] / temperature).log_softmax(-1)
    score = sum(
        c * (reference.logits(h, x.weight, x.bias, x.softcap, x.logit_scale) / temperature).log_softmax(-1)
        for c, h, x in heads
    )
    return (log_p.exp() * score).sum(-1)  # type: ignore[union-attr, no-any-return]


@pytest.mark.parametrize("passes", ["numba", "torch"])
@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_the_float64_twin(monkeypatch: pytest.MonkeyPatch, passes: str, rows: int, dtype: torch.dtype) -> None:
    if passes == "torch":
        monkeypatch.setattr(native, "passes", lambda z: None)
    monkeypatch.setattr(walk, "workspace_rows", lambda task, megabytes: rows)
    monkeypatch.setattr(walk, "TILE_FLOATS", 200)
    case = JointCase.draw(SHAPE, dtype=dtype, softcap=3.0)
    heads = heads_of(case)
    hidden, head, *_ = case.arguments()
    got = linear_expected_score(hidden, head, heads=heads, temperature=1.3)
    wide = case.double()
    want = twin(wide, [(c, h.detach(), x) for c, h, x in heads], 1.3)
    tolerance = 3e-6 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    leaves, others = ([x.leaves[k] for k in ("hidden", "weight", "bias")] for x in (case, wide))
    grads = torch.autograd.grad((case.upstream[0] * got.double()).sum(), leaves)  # type: ignore[arg-type]
    wanted = torch.autograd.grad((case.upstream[0] * want).sum(), others)  # type: ignore[arg-type]
    assert_close(grads, wanted, tolerance)


def test_it_is_what_the_divergences_are_made_of() -> None:
    """E_p[log q] = −KL(p‖q) − H(p)."""
    case = JointCase.draw(SHAPE)
    hidden, head, teacher_hidden, teacher = case.arguments()
    got = linear_expected_score(hidden, head, heads=[(1.0, teacher_hidden, teacher)])
    found = linear_joint(*case.arguments(), outputs=("reverse_kl", "entropy"))
    torch.testing.assert_close(got, -found["reverse_kl"] - found["entropy"], rtol=1e-5, atol=1e-5)
    zero = linear_expected_score(hidden, head, heads=[(1.0, teacher_hidden, teacher), (-1.0, teacher_hidden, teacher)])
    assert zero.abs().max() < 1e-6


def test_a_token_that_nobody_has_and_rows_that_are_left_out() -> None:
    case = JointCase.draw(SHAPE)
    hidden, head, teacher_hidden, teacher = case.arguments()
    out = torch.tensor([2, 30])
    kept = torch.ones(SHAPE[3], dtype=torch.bool).index_fill(0, out, value=False)
    rows = torch.arange(SHAPE[0]) % 2 == 0

    def heads(masked: bool) -> list[Head]:
        found = []
        for x in (head, teacher):
            assert x.bias is not None
            bias = x.bias.detach()
            found.append(
                Head(x.weight, bias.index_fill(0, out, -torch.inf)) if masked else Head(x.weight[kept], bias[kept])
            )
        return found

    values = []
    for student, other in (heads(masked=True), heads(masked=False)):
        value = linear_expected_score(
            hidden, student, heads=[(1.0, teacher_hidden, other), (-0.5, teacher_hidden, other)], rows=rows
        )
        values.append((value, *torch.autograd.grad(value.sum(), (case.leaves["hidden"], case.leaves["weight"]))))  # type: ignore[arg-type]
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    assert (values[0][0][~rows] == 0).all()


REFUSED: dict[str, tuple[Any, str]] = {
    "none": (lambda heads: [], "heads is empty"),
    "nothing": (lambda heads: [(0.0, *heads[0][1:])], "must be finite and not 0"),
    "NaN": (lambda heads: [(float("nan"), *heads[0][1:])], "must be finite and not 0"),
    "vocabulary": (lambda heads: [(1.0, heads[0][1], heads[0][2].columns(0, 9))], "53 tokens and the teacher's 9"),
    "rows": (lambda heads: [(1.0, heads[0][1][:4], heads[0][2])], "21 rows and teacher_hidden 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_remedy(name: str) -> None:
    change, message = REFUSED[name]
    case = JointCase.draw(SHAPE)
    hidden, head, *_ = case.arguments()
    with pytest.raises(ValueError, match=message):
        linear_expected_score(hidden, head, heads=change(heads_of(case)))


@pytest.mark.parametrize("clip", [(0.0, 1.0), (-0.5, torch.inf)])
def test_entries_are_clipped_before_the_mean(clip: tuple[float, float]) -> None:
    case = JointCase.draw(SHAPE, dtype=torch.float64)
    hidden, head, *_ = case.arguments()
    found = linear_expected_score(hidden, head, heads=heads_of(case), clip=clip)
    logits = [(c, reference.logits(h, x.weight, x.bias, x.softcap, x.logit_scale)) for c, h, x in heads_of(case)]
    score = torch.stack([c * z.log_softmax(-1) for c, z in logits]).sum(0).detach().clamp(*clip)
    wanted = (case.logits()[0].softmax(-1) * score).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    ours, twins = (torch.autograd.grad(x.sum(), [hidden, head.weight, head.bias]) for x in (found, wanted))
    assert_close(ours, twins, 1e-10)


def test_limits_that_do_not_rise_are_refused() -> None:
    case = JointCase.draw(SHAPE)
    hidden, head, *_ = case.arguments()
    with pytest.raises(ValueError, match="clip must be two rising limits"):
        linear_expected_score(hidden, head, heads=heads_of(case), clip=(1.0, 0.0))


def test_opcheck_and_one_graph() -> None:
    case = JointCase.draw(SHAPE)
    hidden, head, *_ = case.arguments()
    heads = [(c, h.detach(), x) for c, h, x in heads_of(case)]
    empty = hidden.new_empty(0)
    lists = (
        [h for _, h, _ in heads],
        [x.weight.detach() for _, _, x in heads],
        [empty if x.bias is None else x.bias.detach() for _, _, x in heads],
    )
    settings = ([1.0, -1.0, 0.4], [0.0, 2.5, 0.0], [1.0, 1.0, 0.3], None, 1.0, 1.2, -torch.inf, torch.inf, "torch")
    torch.library.opcheck(op.score_op, (hidden, head.weight, head.bias, *lists, None, *settings))

    def f(x: Tensor) -> Tensor:
        return linear_expected_score(x, head, heads=heads).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(g(hidden), hidden) for g in (compiled, f)))
