"""The gates that every shipped binary passes, for each gate a mutant that it stops; and that all that ships is built.

The kernels are compiled in processes of their own: those of this one may be the interpreter's.
"""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.fused.distillation import fused_linear_distillation_loss
from tvkd_fast.kernels import gathers
from tvkd_fast.kernels.configs import FP_FUSION, INTERPRETED, Demand, Kernel, TileConfig, choose
from tvkd_fast.ops import Upstream, known_logps, linear_entropy, linear_logps, linear_lse

triton = pytest.importorskip("triton", reason="the census compiles with Triton, which is not installed")
TensorDescriptor = triton.tools.tensor_descriptor.TensorDescriptor

ROOT = Path(__file__).parents[2]
CENSUS = ROOT / "bench" / "results" / "census.json"
TOGETHER = pytest.mark.xdist_group("launches")
"""The group of tests that run in one process: recording all launches takes most of a minute."""
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

MUTANTS = {
    "a tile that the registers do not hold": (
        'build("head_stats", "logps", "bf16", "sm_90", config=TileConfig(128, 256, 64, warps=4, stages=3, bulk=True))',
        ["bytes of stack", "spills"],
    ),
    "a pipeline that shared memory does not hold": (
        'build("product", "dH, sum", "bf16", "sm_90", config=TileConfig(128, 128, 64, warps=8, stages=8, bulk=True))',
        ["KiB of shared memory, over 227"],
    ),
    "the same on a consumer's GPU": (
        'build("product", "dH, sum", "bf16", "sm_86", config=TileConfig(128, 128, 64, warps=8, stages=5))',
        ["KiB of shared memory, over 99"],
    ),
    "float32 products outside the tensor cores": (
        'build("product", "dH, sum", "fp32", "sm_80", config=TileConfig(64, 64, 16, warps=8, stages=2), '
        'switches={"PRECISION": "ieee"})',
        ["a product without tensor cores"],
    ),
    "operands whose alignment the compiler does not know": (
        'build("product", "dH, sum", "bf16", "sm_80", config=TileConfig(64, 64, 32, warps=8, stages=2), '
        "hide_alignment=True)",
        ["narrow and 0 16-byte loads in the main loop"],
    ),
}

PROGRAM = """
import json
from dataclasses import replace
from bench.census import binaries as census
from tvkd_fast.kernels.configs import TileConfig

def build(kernel, variant, dtype, target, config, switches={}, hide_alignment=False):
    for build in census.builds((target,)):
        if (build.kernel, build.variant, build.dtype) == (kernel, variant, dtype):
            mutant = replace(build, config=config, switches=build.switches | switches, aligned=not hide_alignment)
            # The gate must see the mutant as the shipped build that it stands for.
            return census.broken_gates(build, census.compiled(mutant))
    raise LookupError(kernel, variant, dtype, target)

print(json.dumps(EXPRESSION))
"""


def compiling(*command: str, **variables: str) -> str:
    """Return the output of a Python process that compiles kernels and does not interpret them."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", **variables}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


HEAVIEST = """
import json
from dataclasses import asdict
from bench.census import binaries as census

def switched_on(build):
    return sum(value is True for value in build.switches.values())

heaviest = {}
for build in census.builds(("sm_90",), ("bf16",)):
    if build.kernel not in heaviest or switched_on(build) >= switched_on(heaviest[build.kernel]):
        heaviest[build.kernel] = build
rows = [census.row(build) for build in heaviest.values()]
print(json.dumps({"kernels": sorted(census.KERNELS), "rows": [asdict(row) for row in rows]}, default=str))
"""


def test_the_heaviest_binary_of_each_kernel_holds_every_gate() -> None:
    found = json.loads(compiling("-c", HEAVIEST).splitlines()[-1])
    assert sorted(row["build"]["kernel"] for row in found["rows"]) == found["kernels"]
    holds_every_gate(found["rows"])


def shipped() -> Iterator[Any]:
    """A target and dtype each. Uncached they compile for a quarter of an hour on two cores, half of it by default."""
    for target, dtype in product(TARGETS, ("bf16", "fp32", "fp16")):
        # float16's code is bfloat16's but for the opcodes of products and conversions; the other targets' float32 takes
        # the tiles of these three.
        quick = dtype == "bf16" or (dtype == "fp32" and target in ("sm_80", "sm_90", "gfx942"))
        yield pytest.param(target, dtype, marks=() if quick else pytest.mark.slow)


def identity(build: dict[str, Any]) -> tuple[str, ...]:
    return tuple(build[name] for name in ("kernel", "variant", "dtype", "target"))


@pytest.mark.census
@pytest.mark.parametrize(("target", "dtype"), list(shipped()))
def test_every_shipped_binary_holds_every_gate(target: str, dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "census.json"
    compiling("-m", "bench.census", "--check", "--target", target, "--dtype", dtype, "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) > 50
    holds_every_gate(rows)


def holds_every_gate(rows: list[dict[str, Any]]) -> None:
    """And behind its product no binary issues a tenth more than when its census was kept."""
    kept = {identity(row["build"]): row["facts"]["epilogue"] for row in json.loads(CENSUS.read_text())["rows"]}
    for row in rows:
        facts = row["facts"]
        assert row["broken"] == []
        assert facts["epilogue"] <= 1.1 * kept[identity(row["build"])], row
        assert facts["stack"] == facts["spills"] == 0
        assert facts["length"] > 100
        if row["build"]["config"] is not None:
            assert sum(facts["tensor"].values()) > 0
            assert facts["registers"] > 32


@cache
def broken_by_mutants() -> dict[str, list[str]]:
    """All in one process, which takes seconds to start."""
    expressions = ", ".join(f"{name!r}: {expression}" for name, (expression, _) in MUTANTS.items())
    found: dict[str, list[str]] = json.loads(
        compiling("-c", PROGRAM.replace("EXPRESSION", f"{{{expressions}}}")).splitlines()[-1]
    )
    return found


@pytest.mark.census
@pytest.mark.xdist_group("mutants")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_stopped(mutant: str) -> None:
    _, gates = MUTANTS[mutant]
    broken = broken_by_mutants()[mutant]
    for gate in gates:
        assert any(gate in problem for problem in broken), broken


def products_without_precision(source: str) -> list[int]:
    """Lines of `tl.dot` calls that leave the precision of float32 to Triton's default, which is TF32."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "dot":
            given: dict[str | None, Any] = {keyword.arg: keyword.value for keyword in node.keywords}
            value = given.get("input_precision")
            if not (isinstance(value, ast.Name) and value.id == "PRECISION"):
                found.append(node.lineno)
    return found


def test_every_product_names_its_precision() -> None:
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert sum(file.read_text().count("tl.dot(") for file in files) >= 4
    assert {file.name: lines for file in files if (lines := products_without_precision(file.read_text()))} == {}


def test_a_product_without_one_is_found() -> None:
    assert products_without_precision("c = tl.dot(a, b, c)") == [1]
    assert products_without_precision("c = tl.dot(a, b, c, input_precision='tf32')") == [1]
    assert products_without_precision("c = tl.dot(a, b, c, input_precision=PRECISION)") == []


def test_the_precision_of_float32() -> None:
    import torch

    from tvkd_fast.kernels.configs import TARGETS as FAMILIES
    from tvkd_fast.kernels.configs import precision

    for family in FAMILIES:
        assert precision(torch.float32, family) == ("ieee" if family == "gfx942" else "tf32x3")
        assert precision(torch.bfloat16, family) == "ieee"


@pytest.mark.census
def test_what_was_rejected_breaks_a_gate() -> None:
    program = "from bench.census import binaries as census; print([census.row(x).broken for x in census.rejected()])"
    broken = ast.literal_eval(compiling("-c", program).splitlines()[-1])
    assert len(broken) >= 10
    assert all(broken)


@dataclass(frozen=True)
class Launch:
    """The compile-time side of a launch: what a launcher passes to Triton, except tensors and numbers."""

    kernel: str
    dtype: str
    switches: dict[str, Any]
    options: dict[str, Any]
    asked: tuple[Kernel, Demand] | None
    """The request to the table of tiles; None where the launch makes none."""


@dataclass(frozen=True)
class Asked(TileConfig):
    """The interpreter's tiles, which carry the table's arguments along to the launch."""

    asked: tuple[Kernel, Demand] | None = None

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"asked": self.asked}


def tiles_with_their_demand(kernel: Kernel, target: str, demand: Demand) -> Asked:
    return Asked(**asdict(INTERPRETED), asked=(kernel, demand))


def constexprs(kernel: Any) -> list[str]:
    """The compile-time parameters of a kernel, compiled or interpreted."""
    annotations = inspect.get_annotations(kernel.fn, eval_str=True)
    return [name for name in kernel.arg_names if annotations.get(name) is triton.language.constexpr]


@contextmanager
def recording(dtype: str, launches: list[Launch]) -> Iterator[None]:
    """Record every launch inside, by any launcher: in `run`, through which Triton starts every kernel."""
    from tvkd_fast.kernels.products import product_kernel

    function = type(product_kernel)
    run = function.run

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> Any:
        asked = given.pop("asked", None)
        assert not args, f"{kernel.fn.__name__} is launched with arguments by place"
        for name, value in given.items():
            if value is not None:
                assert name.endswith("_ptr") == isinstance(value, (Tensor, TensorDescriptor)), name
        switches = {name: given[name] for name in constexprs(kernel)}
        options = {name: value for name, value in given.items() if name not in kernel.arg_names}
        launches.append(Launch(kernel.fn.__name__.removesuffix("_kernel"), dtype, switches, options, asked))
        return run(kernel, grid=grid, warmup=warmup, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "run", record)
        patch.setattr("tvkd_fast.kernels.autotune.choose", tiles_with_their_demand)
        yield


def ops_of_a_head(dtype: torch.dtype, n: int, d: int, v: int, bias: str, softcap: float | None) -> None:
    hidden, weight = torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(v, d).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,))
    offsets = None if bias == "none" else torch.randn(v).to(dtype).requires_grad_(bias == "trained")
    head: dict[str, Any] = {"bias": offsets, "softcap": softcap, "impl": "triton"}
    linear_logps(hidden, weight, labels, **head).sum().backward()
    # One row has all the switches of a gradient made in the forward.
    upstream = Upstream(lambda logps, _: torch.ones_like(logps), torch.tensor([0, 1]), paired=False)
    known_logps(hidden[:1], weight, labels[:1], upstream, **head).sum().backward()
    if bias != "trained":
        linear_logps(hidden, weight.detach(), labels, **head).sum().backward()
    linear_entropy(hidden, weight, **head)
    for kappa in (1.0, 0.5):
        linear_lse(hidden, weight, kappa=kappa, **head)
    with pytest.MonkeyPatch.context() as patch:
        # As where the library's products are the faster way to them.
        patch.setattr("tvkd_fast.kernels.logit_sums.is_faster", lambda hidden: True)
        linear_lse(hidden, weight, **head)


def sparse_ops_of_a_head(dtype: torch.dtype, d: int, bias: bool, softcap: float | None, tail: str, wants: str) -> None:
    """Few columns and many rows: one program per column or row. With six columns or more, some are dense."""
    v = 5 if wants == "both, none dense" else 40
    hidden, weight = torch.randn(20, d).to(dtype), torch.randn(v, d).to(dtype)
    offsets = torch.randn(v).to(dtype).requires_grad_("dH" not in wants) if bias else None
    hidden.requires_grad_(wants != "dW alone")
    weight.requires_grad_(wants != "dH alone")
    options: dict[str, Any] = {"grad_mode": "sparse", "eps": 2.0**-6, "tail": tail, "max_tail": 1.0, "impl": "triton"}
    linear_logps(hidden, weight, torch.randint(v, (20,)), bias=offsets, softcap=softcap, **options).sum().backward()


def joint_ops_of_two_heads(dtype: torch.dtype, d: int, other_d: int, bias: bool, softcap: float | None) -> None:
    from tvkd_fast.kernels.joint_backward import JointWeights, joint_gradients
    from tvkd_fast.kernels.joint_stats import joint_sums
    from tvkd_fast.kernels.joint_values import joint_values
    from tvkd_fast.kernels.records import Head

    n, v = 5, 40
    hidden, other_hidden = torch.randn(n, d).to(dtype), torch.randn(n, other_d).to(dtype)
    head = Head(torch.randn(v, d).to(dtype), torch.randn(v).to(dtype) if bias else None, softcap)
    sides = (hidden, head, other_hidden, Head(torch.randn(v, other_d).to(dtype)))
    labels, ones = torch.randint(v, (n,)), torch.ones(n)
    wants = {"want_hidden": True, "want_weight": True, "want_bias": True}
    for asked in (None, labels):
        for entropy, squares in product((False, True), repeat=2):
            sums = joint_sums(*sides, labels=asked, entropy=entropy, squares=squares)
        given = {"labels": asked}
        values = joint_values(*sides, sums, beta=0.5, **given)
        joint_values(*sides, sums, variation=True, **given)
        mixed = JointWeights(forward_kl=ones, own_to_mixture=ones)
        for weights in (JointWeights(forward_kl=ones), JointWeights(reverse_kl=ones, log_squares=ones), mixed):
            joint_gradients(*sides, asked, sums, weights, values, **wants)
    values = joint_values(*sides, sums, labels=labels, beta=0.5, variation=True, alpha=0.5)
    everything = JointWeights(**dict.fromkeys(("logps", "entropy", "own_to_mixture", "total_variation", "power"), ones))
    joint_gradients(*sides, labels, sums, everything, values, **wants)


def known_ops_of_two_heads(dtype: torch.dtype, bias: bool, softcap: float | None) -> None:
    """A mixture whose gradient the forward makes: the lightest, one without labels, and everything."""
    from tvkd_fast.kernels.records import Head

    n, v = 5, 40
    hidden, weight = torch.randn(n, 16).to(dtype).requires_grad_(), torch.randn(v, 16).to(dtype)
    head, teacher = Head(weight, torch.randn(v).to(dtype) if bias else None, softcap), torch.randn(n, 32).to(dtype)
    mixed = ("reverse_kl", "entropy", "jsd", "tvd", "alpha")
    for labels, names in ((None, ("forward_kl",)), (None, mixed), (torch.randint(v, (n,)), (*mixed, "logps"))):
        fused_linear_distillation_loss(
            *(hidden, head, teacher, torch.randn(v, 32).to(dtype), labels),
            mixture=dict.fromkeys(names, 1.0),
            impl="triton",
        )


def rows_in_tiles(dtype: torch.dtype) -> None:
    """A sparse gradient of rows that no program holds whole."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GATHERED_WHOLE", "GATHERED_TILE"):
            patch.setattr(gathers, name, 16)
        for bias, wants in product((False, True), ("both", "both, none dense")):
            sparse_ops_of_a_head(dtype, 48, bias, None, "even", wants)


def epilogues() -> None:
    from tvkd_fast.kernels.preference_epilogue import TERMINALS, preference_epilogue

    logps, sums, ended = -torch.ones(4), -torch.ones(2), torch.tensor([True, False])
    boundaries = torch.tensor([0, 2, 4])
    states = {"values": torch.ones(4), "cu_states": boundaries}
    sources: tuple[dict[str, Tensor], ...] = ({}, {"psi": sums}, states, states | {"ended": ended})
    numbers = {"beta": 0.1, "alpha": 1.0, "gamma": 1.0, "label_smoothing": 0.0}
    for source, terminal in product(sources, TERMINALS):
        for reference in ({"ref_logps": sums}, {"ref_token_logps": logps}):
            preference_epilogue(logps, boundaries, terminal=terminal, **source, **reference, **numbers)


def test_launches_name_their_arguments_and_pointers_say_so() -> None:
    """The recorder asserts it of each launch; the census takes a parameter's type from its name."""
    # No list is launched where every row is dense, which a few seeds give.
    torch.manual_seed(0)
    launches: list[Launch] = []
    with recording("fp32", launches):
        ops_of_a_head(torch.float32, 3, 16, 40, "none", None)
        known_ops_of_two_heads(torch.float32, True, None)
        sparse_ops_of_a_head(torch.float32, 16, True, None, "unbiased", "both")
        joint_ops_of_two_heads(torch.float32, 16, 32, True, None)
        rows_in_tiles(torch.float32)
        epilogues()
    assert len({x.kernel for x in launches}) == 22


@cache
def recorded() -> tuple[Launch, ...]:
    """Ops over heads of each kind: D of whole steps, of broken ones, and of rows that are not aligned; many blocks."""
    launches: list[Launch] = []
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        with recording(name, launches):
            for d in (64, 48, 33):
                ops_of_a_head(dtype, 130, d, 300, "none", None)
                for bias, softcap in product(("none", "frozen", "trained"), (None, 5.0)):
                    ops_of_a_head(dtype, 20, d, 40, bias, softcap)
                for wants in ("both, none dense", "dH alone", "dW alone"):
                    sparse_ops_of_a_head(dtype, d, False, None, "even", wants)
                for bias, softcap in product((False, True), (None, 5.0)):  # type: ignore[assignment]
                    for tail in ("even", "unbiased") if d == 64 else ("even",):
                        sparse_ops_of_a_head(dtype, d, bias, softcap, tail, "both")
                for bias, softcap in ((False, None), (True, None), (True, 5.0)):  # type: ignore[assignment]
                    joint_ops_of_two_heads(dtype, d, 64, bias, softcap)
            for bias, softcap in product((False, True), (None, 5.0)):  # type: ignore[assignment]
                known_ops_of_two_heads(dtype, bias, softcap)
            rows_in_tiles(dtype)
    with recording("fp32", launches):
        epilogues()
    # The interpreter refuses bfloat16, which is launched as float16 is.
    launches += [replace(x, dtype="bf16") for x in launches if x.dtype == "fp16"]
    return tuple({str(x): x for x in launches}.values())


@pytest.fixture
def launches(blocks: SimpleNamespace) -> tuple[Launch, ...]:
    if torch.cuda.is_available():
        pytest.skip("launchers decide alike where there is no GPU, and nothing has to be compiled")
    blocks.shrink()
    return recorded()


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [x for x in sys.modules if x == "bench" or x.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)
    from bench.census import binaries as census

    return census


SIZES = (
    "BLOCK",
    "BLOCK_M",
    "BLOCK_N",
    "BLOCK_K",
    "BLOCK_E",
    "BLOCK_D",
    "TILES",
    "GROUP",
    "BULK",
    "SPLIT_TILES",
    "TILE",
    "STEP",
    "SCALE",
    "PRECISION",
)
"""Compile-time arguments that follow from the target, the dtype and the row of the table."""

OF_TWO_HEADS = ("OTHER_BIAS", "OTHER_SOFTCAP", "SQUARES", "LOGS", "MIXTURE", "VARIATION", "POWER")
ADDS = ("LABELS", "KAPPA", "ENTROPY", "BIAS", "SOFTCAP", "COLUMN_SUMS", "PREVIOUS", "GRAD", "START", *OF_TWO_HEADS)
GATHERS = ("sparse_rows", "wide_rows", "sparse_columns")
"""Kernels of every D: all sets of switches are built at one, and a light and a heavy one at the others."""
JOINT = ("joint_stats", "joint_values", "joint_dlogits", "block_moments", "block_gradient")
"""Kernels over two heads, which have hundreds of sets of switches: of each tile the one with the most code is built."""

MORE = {"EVEN_K": False, "EVEN_N": False, "UNBIASED": True} | {f"HAS_{name}": True for name in ADDS}
"""The value of a switch that adds code to a kernel and takes none away."""


def live(kernel: str, switches: dict[str, Any], config: TileConfig | None, aligned: bool) -> dict[str, Any]:
    """The switches that the binary depends on, with the values that the target gives them."""
    found = {name: value for name, value in switches.items() if name not in SIZES}
    even, step = ("EVEN_N", "block_n") if kernel == "product" else ("EVEN_K", "block_k")
    if config is not None and config.bulk:
        del found[even]
    elif config is not None and aligned and 16 % getattr(config, step) == 0:
        found[even] = True
    if kernel == "preference_epilogue" and not found["HAS_VALUES"]:
        del found["TERMINAL"], found["HAS_ENDED"]
    elif kernel == "preference_epilogue" and found["TERMINAL"] != "last_content":
        del found["HAS_ENDED"]
    return found


def stands_for(build: Any, launch: Launch, family: str) -> bool:
    """Return whether a build is the launch's binary, or a heavier one where loads of the main loop are masked or
    narrow.

    Such loads change the main loop, and nothing passes from it to the epilogue but the accumulators. What a binary
    holds at most is what its loop or its epilogue holds, so a light epilogue behind a masked loop needs none of its
    own: that loop is built before the heaviest epilogue of the same tiles, and that epilogue behind whole steps.
    """
    config, aligned = None, True
    if launch.asked is not None:
        kernel, demand = launch.asked
        config, aligned = choose(kernel, family, demand), demand.aligned
        if build.dtype != launch.dtype:
            return False
    if (build.kernel, build.config, build.aligned) != (launch.kernel, config, aligned):
        return False
    made, wanted = (live(launch.kernel, x.switches, config, aligned) for x in (build, launch))
    if aligned and wanted.get("EVEN_K", True) and wanted.get("EVEN_N", True):
        if launch.kernel not in GATHERS + JOINT:
            return made == wanted
        if not made.get("EVEN_K", True):
            return False
    return made.keys() == wanted.keys() and all(x in (wanted[name], MORE.get(name)) for name, x in made.items())


def unbuilt(launches: tuple[Launch, ...], builds: list[Any], families: dict[str, str]) -> list[str]:
    return [
        f"{launch} on {target}"
        for launch, (target, family) in product(launches, families.items())
        if not any(build.target == target and stands_for(build, launch, family) for build in builds)
    ]


def families(census: ModuleType) -> dict[str, str]:
    return {target: family for target, (family, _) in census.TARGETS.items()}


@pytest.mark.census
@TOGETHER
def test_every_launch_is_built(launches: tuple[Launch, ...], census: ModuleType) -> None:
    assert {x.kernel for x in launches} == set(census.KERNELS)
    assert unbuilt(launches, list(census.builds()), families(census)) == []


@pytest.mark.census
@TOGETHER
@pytest.mark.parametrize(
    ("kernel", "variant"),
    [
        ("head_stats", "both sums, bias"),
        ("head_stats", "all sums, bias, softcap, unaligned"),
        ("merge_splits", "kappa"),
        ("dlogits", "frozen bias"),
        ("product", "dW, first"),
        ("exponentials", "bias"),
        ("logit_sums", "bias"),
        ("product", "dH, last, odd D"),
        ("preference_epilogue", "values, eos, ref tokens"),
        ("joint_stats", "all"),
        ("joint_merge", "labels"),
        ("joint_values", "mixture, biases"),
        ("joint_dlogits", "logs, biases"),
        ("joint_dlogits", "all, odd D"),
        ("block_moments", "all"),
        ("block_gradient", "all"),
    ],
)
def test_a_launch_that_is_not_is_found(
    launches: tuple[Launch, ...], census: ModuleType, kernel: str, variant: str
) -> None:
    rest = [x for x in census.builds(("sm_80",)) if (x.kernel, x.variant) != (kernel, variant)]
    assert any(f"kernel='{kernel}'" in found for found in unbuilt(launches, rest, {"sm_80": "sm_80"}))


SAME_BINARY = """
import json
from dataclasses import replace
from bench.census import binaries as census

def code(build, **switches):
    # What follows is for debuggers, paths included.
    return census.binary(replace(build, switches=build.switches | switches)).asm["ptx"].split(".file")[0]

builds = {(x.kernel, x.variant): x for x in census.builds(("sm_90",)) if x.dtype in ("bf16", "fp32")}
cases = json.loads(CASES)
print([code(builds[name, variant]) == code(builds[name, variant], **switches) for name, variant, switches in cases])
"""


@pytest.mark.census
def test_switches_that_a_binary_does_not_depend_on() -> None:
    """Test switches that `live` leaves out, and one that it does not, so that the test can fail."""
    cases = [
        ("head_stats", "logps", {"EVEN_K": False}),
        ("dlogits", "plain", {"EVEN_K": False}),
        ("product", "dW, sum", {"EVEN_N": False}),
        ("preference_epilogue", "psi", {"TERMINAL": "eos"}),
        ("preference_epilogue", "DPO", {"TERMINAL": "zero"}),
        ("preference_epilogue", "values, eos", {"HAS_ENDED": True}),
        ("preference_epilogue", "values, last_content", {"HAS_ENDED": True}),
    ]
    same = ast.literal_eval(compiling("-c", SAME_BINARY.replace("CASES", repr(json.dumps(cases)))).splitlines()[-1])
    assert same == [True] * 6 + [False]


@pytest.mark.census
@TOGETHER
def test_every_launch_sets_whether_products_are_fused(launches: tuple[Launch, ...], census: ModuleType) -> None:
    shipped: dict[str, list[Any]] = {}
    for build in census.builds():
        shipped.setdefault(build.kernel, []).append(build.options)
    for launch in launches:
        assert FP_FUSION.items() <= launch.options.items(), launch
        assert launch.asked is not None or launch.options in shipped[launch.kernel], launch
    assert all(FP_FUSION.items() <= build.options.items() for build in census.builds())


@pytest.mark.census
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_compiler_hears_it_whatever_its_default_is(target: str) -> None:
    program = f"from bench.census.binaries import binary, builds; print(binary(next(builds(({target!r},)))).metadata)"
    assert "enable_fp_fusion=True" in compiling("-c", program, TRITON_DEFAULT_FP_FUSION="0")
