"""The joint ops in Triton kernels against their float64 twins: interpreted, or compiled where a GPU is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from joint_case import JointCase, no_noisier
from torch import Tensor

from tvkd_fast.kernels.sliced_head import SlicedHead
from tvkd_fast.ops import Head, linear_expected_score, linear_lse, linear_sparse_divergence, reference, unchecked
from tvkd_fast.ops.joint import joint_op as op
from tvkd_fast.ops.joint.divergence import linear_divergence, linear_joint
from tvkd_fast.ops.joint.outputs import KINDS, OUTPUTS

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter multiplies bfloat16's bit patterns.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if GPU else []))
SHAPE = (37, 24, 16, 131)
HEADS: dict[str, dict[str, Any]] = {
    "bare": {"bias": False},
    "bias": {},
    "softcap": {"softcap": 3.0, "teacher_softcap": 5.0},
    "all": {"softcap": 2.0, "logit_scale": -1.3, "teacher_softcap": 4.0, "teacher_logit_scale": 0.6},
}
TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias")


def drawn(shape: tuple[int, int, int, int] = SHAPE, *, spread: float = 0.5, **options: Any) -> JointCase:
    """A case whose logits are of a few nats, on the device."""
    return moved(JointCase.draw(shape, spread=spread, **options))


def moved(case: JointCase) -> JointCase:
    leaves = {k: None if x is None else x.detach().to(DEVICE).requires_grad_() for k, x in case.leaves.items()}
    return JointCase(leaves, case.labels.to(DEVICE), case.upstream.to(DEVICE), case.transforms)


def changed(case: JointCase, **leaves: Tensor) -> JointCase:
    given = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    return JointCase(case.leaves | given, case.labels, case.upstream, case.transforms)


def right(
    kit: SimpleNamespace, case: JointCase, outputs: tuple[str, ...], *, index: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Values no worse than torch's on upcast inputs, gradients no noisier than of dlogits rounded once to 16 bits."""
    leaves = [x for x in case.leaves.values() if x is not None]
    dtypes = {x.dtype for x in leaves}
    # Models of two dtypes are both computed in float32.
    rounded_to = dtypes.pop() if len(dtypes) == 1 else torch.float32
    got = linear_joint(*case.arguments(), case.labels, outputs=outputs, teacher_index=index, impl="triton", **options)
    wide, single = case.double(), case.upcast(torch.float32)
    exact = wide.twin(outputs, index=index, **options)
    plain = single.twin(outputs, index=index, rounded_to=rounded_to, **options)
    for name in outputs:
        assert got[name].dtype == torch.float32
        kit.no_worse(got[name], exact[name], plain[name], unit=1.0)
    grads = case.gradients(got)
    assert [x.dtype for x in grads] == [x.dtype for x in leaves]
    no_noisier(grads, wide.gradients(exact), single.gradients(plain))
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OUTPUTS)
def test_each_output_alone(kit: SimpleNamespace, name: str, dtype: torch.dtype) -> None:
    head = list(HEADS.values())[OUTPUTS.index(name) % len(HEADS)]
    right(kit, drawn(dtype=dtype, **head), (name,), beta=0.3, alpha=0.7, temperature=1.7)


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_all_outputs_from_one_walk(kit: SimpleNamespace, head: str, dtype: torch.dtype) -> None:
    case = drawn(dtype=dtype, **HEADS[head])
    case.labels[[3, 20, 36]] = -100
    right(kit, case, OUTPUTS, beta=0.3, alpha=0.7, temperature=1.7)


@pytest.mark.interpreter
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_borders_of_beta(kit: SimpleNamespace, beta: float) -> None:
    """JSD is a KL; of the skew KLs one is, and the other is that of a softmax from itself."""
    case = drawn()
    kinds = ("jsd", "skew_forward_kl", "skew_reverse_kl", "forward_kl", "reverse_kl")
    got = right(kit, case, kinds, beta=beta)
    assert torch.equal(got["jsd"], got["forward_kl" if beta == 0.0 else "reverse_kl"])
    assert (got["skew_reverse_kl" if beta == 0.0 else "skew_forward_kl"] == 0).all()


def of_fewer_tokens(case: JointCase, count: int) -> JointCase:
    """The student's first tokens alone."""
    leaves = {name: case.leaves[name][:count] for name in ("weight", "bias")}  # type: ignore[index]
    case.labels = case.labels.remainder(count)
    return changed(case, **leaves)


@pytest.mark.each_once("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [("forward_kl", "entropy", "logps"), ("jsd", "tvd", "alpha", "log_sum_p2")])
@pytest.mark.parametrize("slices", [1, 5])
def test_an_index_into_a_larger_vocabulary(
    kit: SimpleNamespace,
    blocks: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    slices: int,
    outputs: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    if slices > 1:
        monkeypatch.setattr("tvkd_fast.kernels.joint_slices.WHOLE_TILES", 32)
        blocks.shrink(64 * 128)
    case = of_fewer_tokens(drawn((21, 24, 16, 190), dtype=dtype, teacher_softcap=6.0), 131)
    case.labels[4] = -100
    index = torch.randperm(190, generator=torch.Generator().manual_seed(3))[:131].to(DEVICE)
    right(kit, case, outputs, index=index)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("small", [False, True])
def test_models_of_two_dtypes(
    kit: SimpleNamespace,
    blocks: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    small: bool,
    dtype: torch.dtype,
    other: torch.dtype,
) -> None:
    """Both in float32, whichever is shorter; every gradient in its own input's dtype."""
    if small:
        monkeypatch.setattr("tvkd_fast.kernels.joint_slices.WHOLE_TILES", 64)
        blocks.shrink()
    case = drawn(dtype=dtype, softcap=4.0)
    leaves = {name: case.leaves[name].to(other) for name in TEACHER}  # type: ignore[union-attr]
    right(kit, changed(case, **leaves), ("logps", "forward_kl", "skew_reverse_kl"))


def without(case: JointCase, student: Tensor, teacher: Tensor) -> JointCase:
    """Tokens (V,) bool that a model's bias takes out."""
    leaves = {}
    for name, out in (("bias", student), ("teacher_bias", teacher)):
        bias = case.leaves[name]
        assert bias is not None
        leaves[name] = bias.detach().masked_fill(out.to(bias.device), -torch.inf)
    return changed(case, **leaves)


@pytest.mark.parametrize("gathered", [pytest.param(False, marks=pytest.mark.interpreter), True])
def test_tokens_that_neither_model_has(
    kit: SimpleNamespace, blocks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, gathered: bool
) -> None:
    """A whole slice of them, and single ones: as if the rows were not there."""
    monkeypatch.setattr("tvkd_fast.kernels.joint_slices.WHOLE_TILES", 32)
    blocks.shrink(1)
    case = drawn(dtype=torch.float32)
    out = (torch.arange(131) < 40) | (torch.arange(131) == 100)
    kept = (~out).nonzero()[:, 0].to(DEVICE)
    case.labels = kept[case.labels.remainder(len(kept))]
    masked = without(case, out, out)
    cut = changed(case, **{name: case.leaves[name][kept] for name in ("weight", "bias", *TEACHER[1:])})  # type: ignore[index]
    cut.labels = torch.searchsorted(kept, case.labels)
    index = torch.arange(131, device=DEVICE) if gathered else None
    got = linear_joint(*masked.arguments(), masked.labels, outputs=OUTPUTS, teacher_index=index, impl="triton")
    wide, single = cut.double(), cut.upcast(torch.float32)
    exact, plain = wide.twin(OUTPUTS), single.twin(OUTPUTS)
    for name in OUTPUTS:
        kit.no_worse(got[name], exact[name], plain[name], unit=1.0)
    sets = (masked.gradients(got), wide.gradients(exact), single.gradients(plain))
    for name, ours, true, torchs in zip(masked.leaves, *sets, strict=True):
        of_kept = ours if name.endswith("hidden") else ours[kept]
        no_noisier([of_kept], [true], [torchs])
        assert of_kept is ours or (ours[out.to(DEVICE)] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "tvd", "alpha"])
def test_tokens_that_the_teacher_lacks(
    kit: SimpleNamespace, blocks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, kind: str, gathered: bool
) -> None:
    """A whole slice of them, and reverse KL is infinite."""
    monkeypatch.setattr("tvkd_fast.kernels.joint_slices.WHOLE_TILES", 32)
    blocks.shrink(1)
    nothing = torch.zeros(131, dtype=torch.bool)
    case = without(drawn(), nothing, torch.arange(131) < 35)
    index = torch.arange(131, device=DEVICE) if gathered else None
    got = linear_divergence(*case.arguments(), kind=kind, teacher_index=index, impl="triton")  # type: ignore[arg-type]
    single, wide = case.upcast(torch.float32), case.double()
    values, grads = [got], []
    values += [x.twin((kind,))[kind] for x in (wide, single)]
    kit.no_worse(values[0], values[1], values[2], unit=1.0)
    for one, value in zip((case, wide, single), values, strict=True):
        grads.append(torch.autograd.grad(value.sum(), [one.leaves[x] for x in ("hidden", "weight", "bias")]))  # type: ignore[arg-type]
    no_noisier(*grads)
    with unchecked():
        assert linear_divergence(*case.arguments(), kind="reverse_kl", teacher_index=index, impl="triton").isinf().all()


@pytest.mark.parametrize("labelled", [pytest.param(False, marks=pytest.mark.interpreter), True])
def test_rows_that_are_left_out(labelled: bool) -> None:
    """By `rows`, by labels of another ignore_index, and by both."""
    case, rows = drawn(bias=False), torch.arange(SHAPE[0], device=DEVICE) % 3 != 1
    outputs = ("jsd", "entropy", *["logps"] * labelled)
    want = linear_joint(*case.arguments(), case.labels, outputs=outputs, impl="triton")
    labels = case.labels.clone()
    labels[2] = -1
    given = {"labels": labels, "ignore_index": -1} if labelled else {}
    got = linear_joint(*case.arguments(), outputs=outputs, rows=rows, impl="triton", **given)
    left_in = rows & (labels != -1) if labelled else rows
    for name in outputs:
        assert (got[name][~left_in] == 0).all()
        torch.testing.assert_close(got[name][left_in], want[name][left_in], rtol=1e-6, atol=1e-6)
    grads = case.gradients(got)
    assert (grads[0][~left_in] == 0).all()
    case.upstream = case.upstream * left_in
    torch.testing.assert_close(grads, case.gradients(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_student_alone(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    case = drawn(dtype=dtype, softcap=3.0)
    case.labels[3] = -100
    hidden, head, *_ = case.arguments()
    outputs = ("entropy", "logps", "log_sum_p2", "lse")
    got = linear_joint(hidden, head, labels=case.labels, outputs=outputs, impl="triton")
    wide, single = case.double(), case.upcast(torch.float32)
    exact, plain = wide.twin(outputs), single.twin(outputs, rounded_to=dtype)
    for name in outputs:
        kit.no_worse(got[name], exact[name], plain[name], unit=1.0)
    no_noisier(case.gradients(got), wide.gradients(exact), single.gradients(plain))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_token_and_one(rows: int) -> None:
    case = drawn((rows, 8, 5, 70))
    got = linear_joint(*case.arguments(), case.labels, outputs=OUTPUTS, impl="triton")
    assert all(x.shape == (rows,) for x in got.values())
    grads = case.gradients(got)
    assert all(x.isfinite().all() for x in grads)
    assert rows or all((x == 0).all() for x in grads)


def test_everything_is_ignored() -> None:
    case = drawn()
    nothing = torch.full((SHAPE[0],), -100, device=DEVICE)
    for index in (None, torch.arange(131, device=DEVICE)):
        got = linear_joint(*case.arguments(), nothing, outputs=OUTPUTS, teacher_index=index, impl="triton")
        assert all((x == 0).all() for x in got.values())
        assert all((x == 0).all() for x in case.gradients(got))


@pytest.mark.interpreter
def test_a_known_log_sum_exp_changes_nothing() -> None:
    case = drawn()
    _, _, teacher_hidden, teacher = case.arguments()
    _, lse = linear_lse(teacher_hidden, teacher, kappa=1.0 / 1.5)
    plain, given = (
        linear_divergence(*case.arguments(), kind="jsd", temperature=1.5, teacher_lse=x, impl="triton")
        for x in (None, lse)
    )
    assert torch.equal(plain, given)


def several_heads(case: JointCase) -> list[tuple[float, Tensor, Head]]:
    """A teacher, its base of another width and with a softcap, and a third at a factor that is no sign."""
    draw = torch.Generator().manual_seed(9)
    _, _, teacher_hidden, teacher = case.arguments()
    sizes = ((SHAPE[0], 8), (SHAPE[3], 8), (SHAPE[3],))
    states, weight, bias = (torch.randn(*size, generator=draw).to(teacher_hidden) for size in sizes)
    return [
        (1.0, teacher_hidden, teacher),
        (-1.0, states, Head(weight, bias, softcap=2.5)),
        (0.4, states.flip(0), Head(weight, logit_scale=0.3)),
    ]


def score_twin(case: JointCase, heads: list[tuple[float, Tensor, Head]], clip: Any, rounded_to: torch.dtype) -> Tensor:
    z, _ = case.logits(rounded_to=rounded_to)
    log_p, score = (z / 1.3).log_softmax(-1), torch.zeros_like(z)
    for factor, states, head in heads:
        weight, bias = head.weight.to(z.dtype), None if head.bias is None else head.bias.to(z.dtype)
        u = reference.logits(states.to(z.dtype), weight, bias, head.softcap, head.logit_scale)
        score = score + factor * (u.detach() / 1.3).log_softmax(-1)
    return (log_p.exp() * (score if clip is None else score.clamp(*clip))).sum(-1)


SCORES: dict[str, tuple[slice, Any]] = {
    "teacher": (slice(0, 1), None),
    "factor": (slice(2, 3), None),
    "several": (slice(0, 3), None),
    "clipped": (slice(0, 1), (-6.0, -4.0)),
}
ALL_SCORES = [
    pytest.param(*SCORES[name], dtype, id=f"{name}-{dtype}", marks=[] if first else pytest.mark.interpreter)
    for name, dtype, first in [(x, y, (x, y) == ("several", DTYPES[0])) for x in SCORES for y in DTYPES]
]


@pytest.mark.parametrize(("which", "clip", "dtype"), ALL_SCORES)
def test_the_expected_score(
    kit: SimpleNamespace, blocks: SimpleNamespace, which: slice, clip: Any, dtype: torch.dtype
) -> None:
    """Of one head in the kernels over two; of several, and between limits, in blocks of ten rows."""
    blocks.shrink(12 * 131 * 10)
    case, rows = drawn(dtype=dtype, softcap=4.0), torch.arange(SHAPE[0], device=DEVICE) != 5
    hidden, head, *_ = case.arguments()
    heads = several_heads(case)[which]
    wide, single = case.double(), case.upcast(torch.float32)
    values = [
        linear_expected_score(hidden, head, heads=heads, rows=rows, temperature=1.3, clip=clip, impl="triton"),
        score_twin(wide, heads, clip, torch.float64).where(rows, 0.0),
        score_twin(single, heads, clip, dtype).where(rows, 0.0),
    ]
    kit.no_worse(values[0], values[1], values[2], unit=1.0)
    grads = []
    for one, value in zip((case, wide, single), values, strict=True):
        by = [one.leaves[name] for name in ("hidden", "weight", "bias")]
        grads.append(torch.autograd.grad((case.upstream[0] * value.double()).sum(), by))  # type: ignore[arg-type]
    no_noisier(*grads)


@pytest.mark.interpreter
@pytest.mark.parametrize("count", [1, 2])
def test_a_token_that_the_policy_lacks_has_no_score(count: int) -> None:
    """Whether the others have it, one of them or none."""
    case = drawn()
    nothing = torch.arange(131) < 3
    case = without(case, nothing, torch.arange(131) < 2)
    hidden, head, teacher_hidden, teacher = case.arguments()
    assert teacher.bias is not None
    base = Head(teacher.weight.flip(0), teacher.bias.roll(1))
    heads = [(1.0, teacher_hidden, teacher), (-0.5, teacher_hidden, base)][:count]
    found = [linear_expected_score(hidden, head, heads=heads, impl=impl) for impl in ("triton", "torch")]  # type: ignore[arg-type]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    by = (case.leaves["hidden"], case.leaves["weight"])
    grads = [torch.autograd.grad(x.sum(), by) for x in found]  # type: ignore[arg-type]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "wants",
    [(True,) * 6, (True, False, True, False, True, False), (False, True) * 3],
    ids=str,
)
def test_opcheck(wants: tuple[bool, ...]) -> None:
    case = drawn((9, 5, 6, 30))
    for x, want in zip(case.leaves.values(), wants, strict=True):
        assert x is not None
        x.requires_grad_(want)
    settings = ("logps,forward_kl,jsd,entropy", 0.3, 0.5, 4.0, 0.5, None, 1.5, 1.2, -100, "triton")
    torch.library.opcheck(op.joint_op, (*case.leaves.values(), case.labels, None, None, None, *settings))


@pytest.mark.interpreter
def test_one_graph_of_any_number_of_tokens() -> None:
    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return linear_divergence(hidden, weight, teacher, teacher_weight, temperature=1.3, impl="triton").sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (9, 14):
        leaves = [x for x in drawn((n, 8, 16, 70), bias=False).leaves.values() if x is not None]
        torch.testing.assert_close(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)))


@pytest.mark.interpreter
def test_it_is_the_same_twice(blocks: SimpleNamespace) -> None:
    blocks.shrink()
    case = drawn((70, 16, 24, 200))
    first, second = (linear_joint(*case.arguments(), outputs=KINDS, impl="triton") for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert all(torch.equal(x, y) for x, y in zip(case.gradients(first), case.gradients(second), strict=True))


def test_what_no_kernel_computes_is_refused_by_name() -> None:
    case = drawn((4, 8, 16, 20))
    hidden, head, *_ = case.arguments()
    ids, probs = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE), torch.ones(4, 1, device=DEVICE)
    with pytest.raises(ValueError, match="no kernel computes linear_sparse_divergence; take impl='torch'"):
        linear_sparse_divergence(hidden, head, ids, probs, impl="triton")
    wide = case.double()
    with pytest.raises(ValueError, match=r"the kernels compute in float32, bfloat16 and float16, got torch.float64"):
        linear_divergence(*wide.arguments(), impl="triton")


def test_a_broken_state_shows_in_its_own_row() -> None:
    case = drawn((9, 8, 16, 70), softcap=3.0, teacher_softcap=2.0)
    broken = case.leaves["teacher_hidden"].detach().clone()  # type: ignore[union-attr]
    broken[4, 2] = torch.inf
    case = changed(case, teacher_hidden=broken)
    if not GPU:
        with pytest.raises(ValueError, match="the teacher's hidden has NaN or inf in row 4"):
            linear_divergence(*case.arguments(), impl="triton")
        return
    found = linear_divergence(*case.arguments(), impl="triton")
    assert found.isnan().nonzero()[:, 0].tolist() == [4]


def test_a_head_holds_no_more_than_slices(blocks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a gathered head no more rows exist at once than the workspace holds."""
    monkeypatch.setattr("tvkd_fast.kernels.joint_slices.WHOLE_TILES", 32)
    blocks.shrink(64 * 64 * 8)
    widest, columns = [], SlicedHead.columns

    def watched(head: SlicedHead, start: int, stop: int) -> Head:
        widest.append(stop - start)
        return columns(head, start, stop)

    monkeypatch.setattr(SlicedHead, "columns", watched)
    case = drawn((20, 16, 64, 600), bias=False)
    index = torch.arange(600, device=DEVICE).flip(0)
    value = linear_divergence(*case.arguments(), kind="jsd", teacher_index=index, impl="triton")
    value.sum().backward()
    assert max(widest) <= 128
