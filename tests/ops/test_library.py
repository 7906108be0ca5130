"""The registered ops as citizens of torch: opcheck, torch.compile, autocast, torch.func, fakes, dispatch's words."""

import logging
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tvkd_fast.losses import segment_sums, shaping_returns, tvkd_loss
from tvkd_fast.losses.shaping import TERMINALS
from tvkd_fast.ops import (
    HeadStats,
    dispatch,
    linear_entropy,
    linear_logps,
    linear_lse,
    linear_soft_values,
    logps,
    sparse_logps,
)

D, V, FEATURES = 6, 30, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
ops = torch.ops.tvkd_fast

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
compilers = pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler: install g++"),
            ],
        ),
    ],
)


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _said_anew() -> Iterator[None]:
    dispatch._auto.cache_clear()
    yield
    dispatch._auto.cache_clear()


@pytest.mark.each_once("slow")
@every_dtype
@pytest.mark.parametrize("wants", list(product([False, True], repeat=3)), ids=str)
def test_opcheck_of_logps(kit: SimpleNamespace, dtype: torch.dtype, wants: tuple[bool, bool, bool]) -> None:
    case = kit.case(11, D, V, dtype, bias=True, ignored=0.3)
    inputs = [x.requires_grad_(want) for x, want in zip((case.hidden, case.weight, case.bias), wants, strict=True)]
    streamed = wants == (True, False, False)
    workspace = int(any(wants) and not streamed)
    torch.library.opcheck(
        ops.linear_logps.default, (*inputs, case.labels, 4.0, 0.5, -100, "torch", workspace, streamed)
    )
    plain = (*inputs[:2], None, case.labels, None, 1.0, -100, "auto", 0, wants[:2] == (True, False))
    torch.library.opcheck(ops.linear_logps.default, plain)


@every_dtype
def test_opcheck_of_scaled_derivatives(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    case = kit.case(11, D, V, dtype, ignored=0.3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = (case.hidden.to(wide), case.upstream.to(wide), case.labels, -100, dtype)
    torch.library.opcheck(ops.scaled_slopes.default, arguments)


@pytest.mark.each_once("slow")
@every_dtype
@pytest.mark.parametrize("wants", list(product([False, True], repeat=3)), ids=str)
def test_opcheck_of_the_gradients(kit: SimpleNamespace, dtype: torch.dtype, wants: tuple[bool, bool, bool]) -> None:
    case = kit.case(11, D, V, dtype, bias=True, ignored=0.3)
    head = (case.weight, case.bias, case.labels, 4.0, 0.5, -100, "torch")
    _, maximum, log_total, logits = logps._logps(case.hidden, *head, workspace_mb=1, streamed=False)
    upstream = case.upstream.to(maximum.dtype)
    tensors = (upstream, case.hidden, case.weight, case.bias, case.labels, maximum, log_total, logits)
    torch.library.opcheck(ops.linear_logps_gradients.default, (*tensors, 4.0, 0.5, -100, "torch", *wants))


@pytest.mark.each_once("slow")
@every_dtype
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 4.0)])
def test_opcheck_of_the_values(kit: SimpleNamespace, dtype: torch.dtype, bias: bool, softcap: float | None) -> None:
    case = kit.case(11, D, V, dtype, bias=bias)
    head = (case.hidden, case.weight, case.bias, softcap, 0.5)
    for kappa in (1.0, 0.7):
        torch.library.opcheck(ops.linear_lse.default, (*head, kappa, "torch"))
    torch.library.opcheck(ops.linear_entropy.default, (*head, "torch"))


def sparse_arguments(softcap: float | None, unbiased: bool = False) -> tuple[Any, ...]:
    return (softcap, 0.5, -100, 2.0**-5, 100, unbiased, 3, 1.0, False)


@every_dtype
@pytest.mark.parametrize(("softcap", "wants"), [(None, (True, True, True)), (4.0, (True, False, True))], ids=str)
def test_opcheck_of_sparse_logps(
    kit: SimpleNamespace, dtype: torch.dtype, softcap: float | None, wants: tuple[bool, bool, bool]
) -> None:
    case = kit.case(11, D, V, dtype, bias=True, ignored=0.3)
    inputs = [x.requires_grad_(want) for x, want in zip((case.hidden, case.weight, case.bias), wants, strict=True)]
    torch.library.opcheck(ops.sparse_logps.default, (*inputs, case.labels, *sparse_arguments(softcap)))
    plain = (*inputs[:2], None, case.labels, *sparse_arguments(softcap, unbiased=True))
    torch.library.opcheck(ops.sparse_logps.default, plain)


@pytest.mark.each_once("slow")
@every_dtype
@pytest.mark.parametrize("wants", list(product([False, True], repeat=3)), ids=str)
def test_opcheck_of_the_sparse_gradients(
    kit: SimpleNamespace, dtype: torch.dtype, wants: tuple[bool, bool, bool]
) -> None:
    case = kit.case(11, D, V, dtype, bias=True, ignored=0.3)
    tensors = (case.hidden, case.weight, case.bias, case.labels)
    values, *found, _ = sparse_logps._sparse_logps(*tensors, *sparse_arguments(4.0))
    upstream = case.upstream.to(values.dtype)
    torch.library.opcheck(ops.sparse_logps_gradients.default, (upstream, *tensors, *found, 4.0, 0.5, -100, *wants))


def test_opcheck_of_what_is_not_contiguous_and_of_nothing(kit: SimpleNamespace) -> None:
    case = kit.case(11, D, V, bias=True)
    hidden, weight = case.hidden.T.contiguous().T.requires_grad_(), case.weight.repeat(1, 2)[:, ::2].requires_grad_()
    bias = torch.stack([case.bias, case.bias], 1)[:, 0].requires_grad_()
    rest = (None, 1.0, -100, "torch")
    torch.library.opcheck(ops.linear_logps.default, (hidden, weight, bias, case.labels, *rest, 1, False))
    torch.library.opcheck(ops.linear_logps.default, (hidden[:0], weight, bias, case.labels[:0], *rest, 0, False))
    torch.library.opcheck(ops.linear_logps.default, (hidden, weight, bias, torch.full((11,), -100), *rest, 0, False))
    frozen = (hidden, weight.detach(), bias.detach())
    torch.library.opcheck(ops.linear_logps.default, (*frozen, case.labels, *rest, 0, True))
    torch.library.opcheck(ops.linear_logps.default, (hidden[:0], *frozen[1:], case.labels[:0], *rest, 0, True))


class Step(nn.Module):
    """The training step in small: a model of one layer, its head, a teacher, the preference loss."""

    def __init__(self, *, frozen: bool = False, head: dict[str, Any] | None = None, **shaping: Any) -> None:
        super().__init__()
        self.settings = head or {}
        draw = torch.Generator().manual_seed(0)
        self.body = nn.Linear(FEATURES, D)
        with torch.no_grad():
            self.body.weight.copy_(torch.randn(D, FEATURES, generator=draw))
            self.body.bias.zero_()
        self.head = nn.Parameter(torch.randn(V, D, generator=draw), requires_grad=not frozen)
        self.head_bias = nn.Parameter(torch.randn(V, generator=draw), requires_grad=not frozen)
        self.register_buffer("teacher", torch.randn(V, D, generator=draw))
        self.shaping = shaping

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.body(batch["features"])
        per_token = linear_logps(hidden, self.head, batch["labels"], bias=self.head_bias, softcap=8.0, **self.settings)
        teacher = self.get_buffer("teacher").to(batch["states"].dtype)
        state_values = linear_soft_values(batch["states"], teacher, kappa=0.7, value_scale=0.1)
        psi = shaping_returns(state_values, batch["cu_states"], gamma=0.9, ended=batch.get("ended"), **self.shaping)
        return tvkd_loss(segment_sums(per_token, batch["cu_seqlens"]), batch["ref_logps"], psi).loss


def batch_of(lengths: list[int], ended: bool = True) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(sum(lengths))
    n, count = sum(lengths), len(lengths)
    labels = torch.randint(V, (n,), generator=draw)
    labels[::5] = -100
    batch = {
        "features": torch.randn(n, FEATURES, generator=draw),
        "labels": labels,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "states": torch.randn(n + count, D, generator=draw),
        "cu_states": torch.tensor([0, *(length + 1 for length in lengths)]).cumsum(0),
        "ref_logps": -10 * torch.rand(count, generator=draw),
    }
    return batch | ({"ended": torch.arange(count) % 3 != 1} if ended else {})


def loss_and_gradients(step: Callable[..., Tensor], model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    loss = step(batch)
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in model.parameters() if x.requires_grad])]


@compilers
def test_a_frozen_head_in_one_graph(backend: str) -> None:
    model, trained, batch = Step(frozen=True), Step(), batch_of([3, 4, 2, 5])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got = loss_and_gradients(compiled, model, batch)
    torch.testing.assert_close(got, loss_and_gradients(model, model, batch), rtol=1e-5, atol=1e-6)
    everything = [trained(batch), *torch.autograd.grad(trained(batch), list(trained.body.parameters()))]
    torch.testing.assert_close(got, everything, rtol=1e-4, atol=1e-5)


@compilers
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_sparse_head_in_one_graph(backend: str, frozen: bool) -> None:
    settings = {"grad_mode": "sparse", "eps": 2.0**-5, "max_tail": 1.0, "row_cap": 100, "stats": HeadStats()}
    model = Step(frozen=frozen, head=settings)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for lengths in ([3, 4, 2, 5], [7, 2, 6, 3]):
        batch = batch_of(lengths)
        got, want = (loss_and_gradients(step, model, batch) for step in (compiled, model))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert settings["stats"].read()["head_entries"] > 1  # type: ignore[attr-defined]


@compilers
def test_kept_logits_in_one_graph(backend: str) -> None:
    model, plain = Step(head={"workspace_mb": 1}), Step()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for lengths in ([3, 4, 2, 5], [7, 2, 6, 3]):
        batch = batch_of(lengths)
        got, want = loss_and_gradients(compiled, model, batch), loss_and_gradients(plain, plain, batch)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.each_once("slow")
@compilers
@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "all-ended"])
def test_a_whole_step_in_one_graph(backend: str, terminal: str, ended: bool) -> None:
    model, batch = Step(terminal=terminal), batch_of([3, 4, 2, 5], ended)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(
        loss_and_gradients(compiled, model, batch), loss_and_gradients(model, model, batch), rtol=1e-5, atol=1e-6
    )


@compilers
@pytest.mark.parametrize("declared", [False, True], ids=["found-out", "mark_dynamic"])
def test_other_lengths_take_the_same_graph(backend: str, declared: bool) -> None:
    """Test for one graph where the sizes are declared to change, two where torch learns it from the second batch."""
    model, counter = Step(), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for more in (0, 1, 3, 9):
        batch = batch_of([3 + more, 4, 2 + more, 5])
        if declared:
            for name in ("features", "labels", "states"):
                torch._dynamo.mark_dynamic(batch[name], 0)
        got, expected = (loss_and_gradients(step, model, batch) for step in (compiled, model))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == (1 if declared else 2)


def test_dynamic_sizes_and_numbers_of_the_ops() -> None:
    """dynamic=True makes floats symbols too: the checks must trace through them.

    A head's transform is a constant of the model and has a graph of its own for each value; lengths and γ have not.
    """
    weight, counter = torch.randn(V, D), CompileCounterWithBackend("aot_eager")

    def numbers(hidden: Tensor, labels: Tensor, cu: Tensor, scale: float, gamma: float) -> tuple[Tensor, ...]:
        per_token = linear_logps(hidden, weight, labels, softcap=3 * scale, logit_scale=scale)
        state_values = linear_soft_values(hidden, weight, kappa=scale, value_scale=scale)
        return segment_sums(per_token, cu), shaping_returns(state_values, cu, gamma=gamma)

    def graphs(n: int, scale: float, gamma: float) -> int:
        arguments = (torch.randn(n, D), torch.randint(V, (n,)), torch.tensor([0, 3, n]), scale, gamma)
        torch.testing.assert_close(compiled(*arguments), numbers(*arguments))
        return counter.frame_count

    compiled = torch.compile(numbers, fullgraph=True, dynamic=True, backend=counter)
    first = graphs(8, 0.5, 0.9)
    assert graphs(13, 0.5, 0.9) == graphs(34, 0.5, 0.7) == first
    assert graphs(34, 0.25, 0.7) > first


def test_boundaries_of_another_batch_in_a_compiled_step() -> None:
    """The checks that name the entry are left out of a graph; torch's own comparison is still in it."""
    compiled = torch.compile(segment_sums, fullgraph=True, backend="aot_eager")
    compiled(torch.zeros(4), torch.tensor([0, 1, 4]))
    with pytest.raises(RuntimeError, match="lengths"):
        compiled(torch.zeros(4), torch.tensor([0, 1, 5]))


def test_labels_out_of_range_in_a_compiled_step() -> None:
    compiled = torch.compile(linear_logps, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"labels out of range in row 1: \[30\] not in \[0, 30\)"):
        compiled(torch.zeros(2, D), torch.zeros(V, D), torch.tensor([0, V]))


@compilers
def test_a_compiled_step_under_autocast(backend: str) -> None:
    model, batch = Step(), batch_of([3, 4, 2, 5])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for step in (compiled, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step(batch)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    full = loss_and_gradients(model, model, batch)
    assert not torch.equal(results[1][1], full[1]), "autocast changed nothing: the test compares nothing"


def test_a_second_derivative_of_a_compiled_step_is_refused(kit: SimpleNamespace) -> None:
    case = kit.case(8, D, V)
    hidden = case.hidden.requires_grad_()
    compiled = torch.compile(linear_logps, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(hidden, case.weight, case.labels).sum(), hidden, create_graph=True)
    # Before torch 2.13 a compiled gradient had no derivative at all, and says that.
    with pytest.raises(RuntimeError, match=r"does not currently support double backward|does not require grad"):
        grad.sum().backward()


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.expand(2, *x.shape)),
    "vmap-of-grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x.expand(2, *x.shape)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_refused(kit: SimpleNamespace, name: str) -> None:
    case = kit.case(8, D, V)
    with pytest.raises(RuntimeError, match=r"takes no torch.func transform.*torch.autograd.grad or backward\(\) for"):
        TRANSFORMS[name](lambda x: linear_logps(x, case.weight, case.labels), case.hidden)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
def test_transforms_in_a_compiled_graph_are_refused(kit: SimpleNamespace, name: str) -> None:
    case = kit.case(8, D, V)

    def transformed(x: Tensor) -> Any:
        return TRANSFORMS[name](lambda x: linear_logps(x, case.weight, case.labels), x)

    with pytest.raises(RuntimeError, match=r"linear_logps takes no torch.func transform"):
        torch.compile(transformed, fullgraph=True, backend="aot_eager")(case.hidden)


@pytest.mark.parametrize("op", [linear_lse, linear_entropy, linear_soft_values], ids=lambda op: op.__name__)
def test_values_refuse_vmap_and_are_constants_elsewhere(kit: SimpleNamespace, op: Callable[..., Any]) -> None:
    case = kit.case(8, D, V)

    def first(x: Tensor) -> Tensor:
        out = op(x, case.weight)
        return out if isinstance(out, Tensor) else out[0]

    with pytest.raises(RuntimeError, match=r"has no vmap: flatten it into the rows of \[N, D\]"):
        TRANSFORMS["vmap"](first, case.hidden)
    grad = torch.func.grad(lambda x: (x.sum(1) * first(x)).sum())(case.hidden)
    torch.testing.assert_close(grad, first(case.hidden)[:, None].expand(8, D))


@pytest.mark.parametrize("wants", [False, True], ids=["constant", "wants-a-gradient"])
def test_forward_mode_is_refused(kit: SimpleNamespace, wants: bool) -> None:
    case = kit.case(8, D, V)
    hidden = case.hidden.requires_grad_(wants)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(case.weight, torch.ones_like(case.weight))
        with pytest.raises(RuntimeError, match="linear_logps has no forward-mode derivative: take"):
            linear_logps(hidden, dual, case.labels)


def test_many_upstream_gradients_at_once(kit: SimpleNamespace) -> None:
    case = kit.case(8, D, V)
    hidden = case.hidden.requires_grad_()
    got = linear_logps(hidden, case.weight, case.labels)
    (batched,) = torch.autograd.grad(got, hidden, torch.eye(8), retain_graph=True, is_grads_batched=True)
    singly = [torch.autograd.grad(got, hidden, row, retain_graph=True)[0] for row in torch.eye(8)]
    torch.testing.assert_close(batched, torch.stack(singly))


@every_dtype
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_shapes_without_numbers(kind: str, dtype: torch.dtype) -> None:
    with torch.device("meta") if kind == "meta" else FakeTensorMode():
        hidden, weight = torch.empty(11, D, dtype=dtype), torch.empty(V, D, dtype=dtype, requires_grad=True)
        bias, labels = torch.empty(V, dtype=dtype, requires_grad=True), torch.empty(11, dtype=torch.int64)
        per_token = linear_logps(hidden, weight, labels, bias=bias)
        numbers = [per_token, *linear_lse(hidden, weight, kappa=0.7), linear_entropy(hidden, weight)]
        grads = torch.autograd.grad(per_token.sum(), (weight, bias))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [(x.shape, x.dtype) for x in numbers] == [((11,), wide)] * 4
    assert [(x.shape, x.dtype) for x in grads] == [((V, D), dtype), ((V,), dtype)]


def test_auto_says_once_what_it_took(kit: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    case = kit.case(8, D, V)
    with caplog.at_level(logging.INFO, logger="tvkd_fast"):
        for _ in range(3):
            linear_logps(case.hidden, case.weight, case.labels)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "impl='auto' computes the head in torch tiles: the tensors are on the CPU")
    ]


@pytest.mark.parametrize("refusal", [None, "no kernel is configured for sm_70: take impl='torch'"])
def test_auto_warns_of_a_gpu_that_goes_unused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refusal: str | None
) -> None:
    monkeypatch.setattr(dispatch, "_no_triton", lambda device, dtype: refusal)
    with caplog.at_level(logging.INFO, logger="tvkd_fast"):
        taken = [dispatch._auto(torch.device("cuda"), torch.float16) for _ in range(2)]
    assert taken == [refusal is None] * 2
    (record,) = caplog.records
    assert record.levelname == ("INFO" if refusal is None else "WARNING")
    expected = f"in torch tiles: {refusal}" if refusal else "in Triton kernels: cuda tensors of torch.float16"
    assert expected in record.getMessage()


@pytest.mark.parametrize(
    ("interpreted", "dtype", "remedy"),
    [
        (False, torch.float32, "want CUDA or ROCm tensors, not cpu: move them, take impl='torch', or set TRITON_INTER"),
        (False, torch.float64, r"got torch.float64; cast, or take impl='torch'"),
        (True, torch.float64, r"got torch.float64; cast, or take impl='torch'"),
        (True, torch.bfloat16, "interpreter multiplies bfloat16 wrongly; use float32"),
    ],
)
def test_triton_that_cannot_be_had(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, interpreted: bool, dtype: torch.dtype, remedy: str
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("tvkd_fast.kernels.launch.INTERPRETED", interpreted)
    case = kit.case(8, D, V, dtype)
    for op, arguments in ((linear_logps, (case.labels,)), (linear_lse, ()), (linear_entropy, ())):
        with pytest.raises(ValueError, match="impl='triton' cannot be had: .*" + remedy):
            op(case.hidden, case.weight, *arguments, impl="triton")


def test_triton_that_is_not_installed(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    case = kit.case(8, D, V)
    with pytest.raises(ValueError, match="triton is not installed"):
        linear_logps(case.hidden, case.weight, case.labels, impl="triton")


def test_a_launcher_handed_a_cpu_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("tvkd_fast.kernels.launch")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="compiled kernels want CUDA or ROCm tensors, not cpu"):
        launch.target_of(torch.zeros(1))


@every_dtype
def test_activation_checkpointing(kit: SimpleNamespace, dtype: torch.dtype) -> None:
    case = kit.case(20, D, V, dtype, bias=True, softcap=5.0)

    def checkpointed(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(linear_logps, *args, use_reentrant=False, **kwargs)

    got, expected = kit.run(checkpointed, case), kit.run(linear_logps, case)
    for name in ("logps", "hidden", "weight", "bias"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
