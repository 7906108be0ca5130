"""The compiled pass over a tile against torch's passes: the same entries, the same sums to rounding."""

import math
import multiprocessing
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from tvkd_fast.ops import HeadStats, linear_logps
from tvkd_fast.ops.tiles import native

pytest.importorskip("numba", reason="numba is not installed: pip install 'tvkd_fast[numba]'")
from tvkd_fast.ops.tiles import numba_passes
from tvkd_fast.ops.tiles.joint import compiled, numba_pairs, numba_selection, one_walk


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which numba is not there."""

    class Without:
        def __enter__(self) -> None:
            monkeypatch.setattr(native, "passes", lambda z: None)

        def __exit__(self, *_: Any) -> None:
            monkeypatch.undo()

    return Without()


def sparse(stats: HeadStats, **options: Any) -> Any:
    def op(*args: Any, **transforms: Any) -> torch.Tensor:
        return linear_logps(*args, grad_mode="sparse", stats=stats, **options, **transforms)

    return op


@draws(40, fresh=True)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(2, 300)),
    log_eps=st.integers(4, 20),
    floats=st.integers(64, 8192),
    rows=st.integers(1, 40),
    spread=st.sampled_from([0.1, 3.0, 30.0, 1e4]),
    bias=st.booleans(),
    cap=st.sampled_from([3, 10**6]),
    seed=st.integers(0, 2**16),
)
def test_the_entries_are_torchs(
    kit: SimpleNamespace,
    shape: tuple[int, int, int],
    log_eps: int,
    floats: int,
    rows: int,
    spread: float,
    bias: bool,
    cap: int,
    seed: int,
) -> None:
    case = kit.case(*shape, spread=spread, seed=seed, bias=bias)
    options = {"eps": 2.0**-log_eps, "row_cap": cap, "max_tail": 1.0}
    found = []
    for passes in (native.passes, lambda z: None):
        stats = HeadStats()
        with pytest.MonkeyPatch.context() as patch, kit.tile_sizes(floats, rows):
            patch.setattr(native, "passes", passes)
            found.append((kit.run(sparse(stats, **options), case), stats.read()))
    (ours, read), (plain, torch_read) = found
    for name in ("logps", "hidden", "weight", "bias"):
        got, want = getattr(ours, name), getattr(plain, name)
        if want is not None:
            unit = max(float(want.abs().max()), 1.0) if want.numel() else 1.0
            # An entry on the edge may be on either side of it: it is worth ε.
            torch.testing.assert_close(got, want, rtol=0, atol=(4 * 2.0**-log_eps + 1e-5) * unit)
    assert (
        read["head_entries"] == pytest.approx(torch_read["head_entries"], abs=2 / max(1, shape[0]) + 1e-9) or cap == 3
    )


def test_the_running_maximum_is_the_largest_float() -> None:
    odd = [-math.inf, -1e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 2.5, 3e38, math.inf]
    for stop in range(1, len(odd) + 1):
        for row in (odd[:stop], odd[stop - 1 :: -1]):
            z, maximum = torch.tensor([row]), torch.full((1,), -math.inf)
            native.passes(z).add(z, maximum, torch.zeros(1))
            assert maximum == z.max()


def test_a_softmax_is_right_down_to_the_smallest_normal_float() -> None:
    d = torch.linspace(-87, 0, 20_001)[None]
    got = torch.empty_like(d)
    native.passes(d).softmax(d, torch.zeros(1), torch.zeros(1), out=got)
    torch.testing.assert_close(got.double(), d.double().exp(), rtol=2 * 2**-23, atol=0)


def test_keeping_everything_is_exact(kit: SimpleNamespace) -> None:
    stats = HeadStats()
    for spread in (0.5, 3.0, 20.0):
        case = kit.case(37, 16, 1000, spread=spread, ignored=0.0)
        kit.logps_no_worse(case, sparse(stats, eps=0.0, row_cap=1000, max_tail=1.0))
    assert stats.read()["head_entries"] == pytest.approx(999, abs=60)


def test_a_broken_state_shows(kit: SimpleNamespace) -> None:
    for broken in (math.nan, math.inf):
        case = kit.case(8, 6, 100, ignored=0.0)
        case.hidden[3, 2] = broken
        with pytest.raises(ValueError, match="hidden has NaN or inf in row 3"):
            kit.run(sparse(HeadStats(), eps=2.0**-8), case)


def test_tokens_that_a_bias_takes_out(kit: SimpleNamespace, in_torch: Any) -> None:
    case = kit.case(20, 6, 200, bias=True, ignored=0.0)
    case.bias[:96] = -torch.inf
    case.labels.clamp_(min=96)
    op = sparse(HeadStats(), eps=2.0**-8, max_tail=1.0)
    got = kit.run(op, case)
    with in_torch:
        want = kit.run(op, case)
    torch.testing.assert_close(got.weight, want.weight)
    assert (got.weight[:96] == 0).all()


def test_the_exponential_is_float32s(kit: SimpleNamespace) -> None:
    """Through the log-probabilities, of which it is nearly all: no worse than torch's own."""
    case = kit.case(200, 32, 4000, spread=6.0, ignored=0.0)
    kit.logps_no_worse(case, sparse(HeadStats(), eps=0.0, row_cap=4000))


def test_a_fork_does_not_wait_for_threads_that_it_has_not(kit: SimpleNamespace) -> None:
    """A child of a process that has used numba computes in torch."""
    case = kit.case(8, 6, 100, ignored=0.0)
    want = linear_logps(case.hidden, case.weight, case.labels)
    assert native.passes(case.hidden) is not None
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        there = native.passes(case.hidden) is not None
        answers.put((there, linear_logps(case.hidden, case.weight, case.labels).tolist()))

    process = context.Process(target=child)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    there, got = answers.get()
    assert not there
    torch.testing.assert_close(torch.tensor(got), want)


def test_torchs_threads_stay_as_many_as_they_were() -> None:
    """Numba's pool sets OpenMP's number for the whole process, once: hence a process of its own."""
    script = """
import torch
from tvkd_fast.ops.tiles import native
torch.set_num_threads(1)
assert native.passes(torch.zeros(1)) is not None
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stdout + done.stderr


def test_without_numba_torch_computes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    native._compiled.cache_clear()
    assert native.passes(torch.zeros(1)) is None
    native._compiled.cache_clear()
    monkeypatch.undo()

    def broken() -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(numba_passes, "compile_all", broken)
    assert native.passes(torch.zeros(1)) is None
    assert "numba is installed and cannot compile here" in caplog.text
    native._compiled.cache_clear()


@pytest.mark.parametrize(("place", "kernels"), [(compiled, numba_pairs), (one_walk, numba_selection)])
def test_where_a_joint_walk_cannot_be_compiled_torch_computes(
    place: ModuleType, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(kernels, "compile_all", broken)
    native.compiled_module.cache_clear()
    assert place.passes(torch.zeros(1)) is None
    assert "joint walk's passes here (no compiler here): they are torch's" in caplog.text
    native.compiled_module.cache_clear()
    monkeypatch.undo()
    assert place.passes(torch.zeros(1)) is not None
