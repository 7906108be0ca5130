"""`bench.gpu` without a GPU: inputs, checks, frozen heads, refusals, turns and tables, under a meter that counts."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)
    from bench.gpu import comparison as gpu

    return gpu


class CountingMeter:
    """The n-th timed run takes n milliseconds, and every run a MiB."""

    def __init__(self):
        self.timed = []

    def start(self, make, measure):
        return CountingJob(self, make(), measure)


class CountingJob:
    def __init__(self, meter, call, measure):
        self.meter, self.call, self.measure = meter, call, measure

    def check(self):
        return self.measure(self.call())

    def warm_up(self):
        self.call()

    def seconds(self):
        self.meter.timed.append(self)
        return len(self.meter.timed) / 1e3

    def peak_bytes(self):
        self.call()
        return 2**20


def measured(gpu, chosen, dtype=torch.float32, shape=(24, 16, 97), **options):
    meter = CountingMeter()
    found = gpu.measure(gpu.make_inputs(shape, dtype, "cpu"), chosen, meter, rounds=3, **options)
    return found, meter


def beyond(row):
    """Names of the numbers that a wrong row says are off."""
    return [part.partition(" beyond ")[0] for part in row["wrong"].split(", ")]


def some(gpu, *names):
    return {name: contender for name, contender in gpu.on_gpu("torch").items() if name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_that_are_right_are_timed_in_turns(gpu, dtype):
    names = ("tvkd_fast", "eager", "tvkd_fast, DPO")
    found, meter = measured(gpu, some(gpu, *names), dtype)
    rows = {row["name"]: row for row in found["rows"]}
    assert tuple(rows) == names
    for row in rows.values():
        assert not row.keys() & {"wrong", "refused"}
        assert all(row["errors"][name] <= limit for name, limit in row["limits"].items())
        assert row["both_peak_mb"] == 1
    # Seven jobs a round: the product, then both of three contenders, then forward of three.
    assert meter.timed[:7] == meter.timed[7:14] == meter.timed[14:21]
    assert len(set(meter.timed)) == len(meter.timed) // 3 == 7
    assert found["product_ms"] == pytest.approx([4.5, 8.0, 11.5])
    assert rows["eager"]["both_over_product"] == pytest.approx(10 / 8)
    assert rows["eager"]["forward_over_product"] == pytest.approx(13 / 8)


@pytest.mark.parametrize("broken", ["scaled", "coefficients", "forward"])
def test_a_wrong_contender_is_reported_and_not_timed(gpu, broken):
    from bench.harness import inputs as task
    from bench.head import contenders, peers

    def head(hidden, weight, labels):
        logps = peers.eager(hidden, weight, labels)
        return logps * 1.01 if broken == "scaled" or (broken == "forward" and not hidden.requires_grad) else logps

    def run(inputs):
        values, loss = task.weighted(head, inputs)
        return values, values.sum() if broken == "coefficients" else loss

    found, meter = measured(gpu, {"bad": contenders.Contender(run=run)})
    (row,) = found["rows"]
    expected = {
        "scaled": ["logps", "hidden", "weight", "logps of forward only"],
        "coefficients": ["hidden", "weight"],
        "forward": ["logps of forward only"],
    }
    assert beyond(row) == expected[broken]
    assert "both_ms" not in row
    assert len(meter.timed) == 3


def test_nan_is_wrong(gpu):
    from bench.head import contenders, peers

    found, _ = measured(gpu, {"nan": contenders.of(lambda h, w, y: peers.eager(h, w, y) * float("nan"))})
    assert "wrong" in found["rows"][0]


class Skipping(torch.autograd.Function):
    """Loses a twentieth of the gradient."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.95


def test_only_a_contender_that_skips_may_be_that_far_off(gpu):
    from bench.head import contenders, peers

    def head(hidden, weight, labels):
        return peers.eager(Skipping.apply(hidden), weight, labels)

    found, _ = measured(gpu, {"skips": contenders.of(head, skips=True), "does not": contenders.of(head)})
    skips, other = found["rows"]
    assert "wrong" not in skips
    assert beyond(other) == ["hidden"]


def test_frozen_heads_come_after_the_others(gpu):
    frozen = {name: contender.frozen for name, contender in gpu.on_gpu().items()}
    assert list(frozen.values()) == sorted(frozen.values())
    assert [name for name in frozen if frozen[name]] == [
        f"{name}, frozen head" for name in ("tvkd_fast", "eager", "torch.compile", "Liger", "CCE")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_heads_that_are_right_are_timed_forward_and_backward(gpu, dtype):
    names = ("eager", "tvkd_fast, frozen head", "eager, frozen head")
    found, meter = measured(gpu, some(gpu, *names), dtype)
    whole, *frozen = found["rows"]
    for row in frozen:
        assert "wrong" not in row
        assert tuple(row["errors"]) == ("logps", "hidden")
        assert row["limits"] == {name: whole["limits"][name] for name in ("logps", "hidden")}
        assert row["both_peak_mb"] == 1
        assert not [key for key in row if key.startswith("forward")]
    # Five jobs a round: the product, both of three contenders, forward of the one whose head is not frozen.
    assert len(set(meter.timed)) == len(meter.timed) // 3 == 5
    assert found["product_ms"][1] == pytest.approx(6)
    assert [row["both_over_product"] for row in frozen] == pytest.approx([8 / 6, 9 / 6])
    assert "1.33 x the product, forward      –" in gpu.text(found | {"shape": "24x16x97", "dtype": "any"})


@pytest.mark.parametrize(("scale", "wrong"), [(1.0, ["hidden"]), (1.01, ["logps", "hidden"])])
def test_a_frozen_heads_wrong_gradient_is_named(gpu, scale, wrong):
    from bench.head import contenders, peers

    def head(hidden, weight, labels):
        return scale * peers.eager(Skipping.apply(hidden), weight, labels)

    found, meter = measured(gpu, {"bad": contenders.of(head, frozen=True)})
    (row,) = found["rows"]
    assert beyond(row) == wrong
    assert "both_ms" not in row
    assert len(meter.timed) == 3


def test_a_frozen_head_is_not_asked_for_weights_gradient(gpu):
    from bench.head import contenders

    asked = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            ctx.save_for_backward(hidden, weight)
            return hidden @ weight.T

        @staticmethod
        def backward(ctx, grad):
            asked.append(ctx.needs_input_grad)
            hidden, weight = ctx.saved_tensors
            return grad @ weight, grad.T @ hidden if ctx.needs_input_grad[1] else None

    def head(hidden, weight, labels):
        return Product.apply(hidden, weight).log_softmax(-1).gather(1, labels[:, None])[:, 0]

    for frozen in (False, True):
        asked.clear()
        found, _ = measured(gpu, {"head": contenders.of(head, frozen=frozen)})
        assert "both_ms" in found["rows"][0]
        assert set(asked) == {(True, not frozen)}


@pytest.mark.parametrize("name", ["tvkd_fast", "eager"])
def test_a_frozen_head_takes_two_products(gpu, kit, name):
    inputs = gpu.make_inputs((24, 16, 97), torch.float32, "cpu")
    contender = gpu.on_gpu("torch")[f"{name}, frozen head"]
    with kit.Watch() as watch:
        results = gpu.both(contender.run, contender.given(inputs))
    assert [x.shape for x in results] == [(24,), (24, 16)]
    assert watch.multiply_adds == 2 * 24 * 16 * 97


def test_what_cannot_run_is_a_row_with_the_reason(gpu):
    from bench.head import contenders

    def refusing(inputs):
        raise AssertionError("wants V % 128 == 0\nand more")

    def missing(inputs):
        import no_such_peer  # type: ignore[import-not-found]  # noqa: F401

    chosen = {"a": contenders.Contender(run=refusing), "b": contenders.Contender(run=missing)}
    chosen |= some(gpu, "eager", "tvkd_fast, DPO")
    found, _ = measured(gpu, chosen, shape=(25, 16, 97), without=frozenset({"eager"}))
    assert [row["refused"] for row in found["rows"]] == [
        "AssertionError: wants V % 128 == 0",
        "not installed: No module named 'no_such_peer'",
        "left out by --without",
        "ValueError: 25 tokens are not 4 pairs of equal length",
    ]
    assert all("256 rows" in row["refused"] for row in found["products"])
    assert gpu.ours_failed({"shapes": [found | {"shape": "25x16x97"}]})[0].startswith("25x16x97: tvkd_fast, DPO: ")
    assert "No module named" in gpu.text(found | {"shape": "25x16x97", "dtype": "float32"})


def test_every_peer_is_installed_or_says_that_it_is_not(gpu, monkeypatch):
    for peer in ("liger_kernel", "cut_cross_entropy", "trl"):
        for name in [n for n in sys.modules if n == peer or n.startswith(f"{peer}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, peer, None)
    names = [name for name in gpu.on_gpu() if name.startswith(("Liger", "CCE", "TRL"))]
    found, _ = measured(gpu, some(gpu, *names))
    assert len(names) == 8
    assert all(row["refused"].startswith("not installed: ") for row in found["rows"])


def test_without_a_gpu_the_command_says_what_is_missing(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="needs a GPU") as left:
        gpu.main()
    assert left.value.code not in (0, None)


def report(gpu):
    found, _ = measured(gpu, some(gpu, "tvkd_fast"))
    found["rows"] += [
        {"name": "CCE", "refused": "not installed: no <x>|y"},
        {"name": "Liger", "errors": {"logps": 1e-4, "hidden": 0.5, "weight": 0.25}, "wrong": "hidden, weight beyond"},
    ]
    found["products"] = [{"name": "dH, a block", "over_cublas": 1.25}, {"name": "dW, a block", "refused": "too small"}]
    made = {"torch": "2", "transformers": "5", "python": "3", "commit": "c" * 40, "machine": "m", "command": "run it"}
    return {
        "device": "H",
        "driver": "1.2",
        "toolkit": "CUDA 13",
        "versions": {"triton": "3.9", "trl": None},
        "rounds": 3,
        "made_by": made,
        "shapes": [
            found | {"shape": "24x16x97", "dtype": "float32"},
            {"shape": "9x9x9", "dtype": "bfloat16", "refused": "OutOfMemoryError: much"},
        ],
    }


def test_the_table_of_a_report(gpu):
    from bench.tables import kernels

    first, products, second, made = kernels.gpu_table(report(gpu)).split("\n\n")
    head, _, ours, refused, wrong = first.splitlines()
    assert head.startswith("| 24x16x97 float32 | forward and backward over the product |")
    assert ours.startswith("| tvkd_fast | 1.25 | 1.50 | 1 | ")
    assert refused == "| CCE: not installed: no &lt;x>\\|y | – | – | – | – |"
    assert wrong == "| Liger: wrong: hidden, weight beyond | – | – | – | 1.0e-04, 5.0e-01, 2.5e-01 |"
    assert products == "Our products over cuBLAS: dH, a block 1.25; dW, a block too small."
    assert second.splitlines()[2] == "| not measured: OutOfMemoryError: much | – | – | – | – |"
    assert made == "H, driver 1.2, CUDA 13; 3 rounds; m, [ccccccc](JSON)."


def test_the_table_of_a_frozen_head(gpu):
    from bench.tables import kernels

    found, _ = measured(gpu, some(gpu, "tvkd_fast", "tvkd_fast, frozen head"))
    found["rows"][1]["errors"] = {"logps": 1e-7, "hidden": 2e-7}
    with_gpu_shapes = report(gpu) | {"shapes": [found | {"shape": "24x16x97", "dtype": "float32"}]}
    table, _, note, made = kernels.gpu_table(with_gpu_shapes).split("\n\n")
    assert table.splitlines()[-1] == "| tvkd_fast, frozen head | 1.40 | – | 1 | 1.0e-07, 2.0e-07, – |"
    assert note == kernels.FROZEN
    assert made.startswith("H, driver 1.2")
    with_gpu_shapes["shapes"][0]["rows"].pop()
    assert kernels.FROZEN not in kernels.gpu_table(with_gpu_shapes)


def test_the_command_writes_what_the_table_reads(gpu, monkeypatch, tmp_path, capsys):
    from bench.harness.machine import without_paths
    from bench.tables import kernels

    make_inputs, chosen = gpu.make_inputs, some(gpu, "tvkd_fast", "eager")
    facts = {"device": "D", "driver": "1", "toolkit": "T", "versions": {}}
    monkeypatch.setattr(gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(gpu, "device_facts", lambda: dict(facts))
    monkeypatch.setattr(gpu, "GpuMeter", CountingMeter)
    monkeypatch.setattr(gpu, "on_gpu", lambda: chosen)
    monkeypatch.setattr(gpu, "make_inputs", lambda shape, dtype, device: make_inputs(shape, dtype, "cpu"))
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--shape", "24x16x97", "--rounds", "2", "--json", str(file)])
    with pytest.raises(SystemExit, match="24x16x97: dH, a block: ValueError: a block takes 256 rows"):
        gpu.main()
    written = file.read_text()
    assert without_paths(written) == written
    table = kernels.gpu_table(json.loads(written))
    assert "| tvkd_fast | " in table
    assert "| eager | " in table
    assert "tvkd_fast " in capsys.readouterr().out


def test_the_reference_is_float64s_plain_result(gpu):
    from bench.gpu import rounding
    from bench.harness import inputs as task

    inputs = task.make_inputs((24, 16, 97), torch.bfloat16, "cpu")
    reference, limits = rounding.RoundingChecker(inputs).of("logps")
    doubled = inputs.double()
    logps = torch.log_softmax(doubled.hidden @ doubled.weight.T, -1)[torch.arange(24), inputs.labels]
    want = (logps, *torch.autograd.grad((logps * doubled.coefficients).sum(), (doubled.hidden, doubled.weight)))
    for name, expected in zip(("logps", "hidden", "weight"), want, strict=True):
        torch.testing.assert_close(reference.numbers[name], expected, rtol=1e-12, atol=1e-12)
        # Sixteen times what bfloat16's own rounding takes.
        assert 1e-3 < limits[name] < 0.3
