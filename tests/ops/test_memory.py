"""The memory that the ops promise: no tensor of logits, and at most 64 MB beside inputs, results and gradients."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tvkd_fast.ops import linear_logps, linear_soft_values

MEBI = 2**20
CLEAR_REFS = Path("/proc/self/clear_refs")

MEASURE = """
import json, sys
from pathlib import Path
import torch
from tvkd_fast import fused_linear_tvkd_loss
from tvkd_fast.ops import HeadStats, linear_cached_forward_kl, linear_divergence, linear_logps, linear_soft_values
from tvkd_fast.ops.joint.top_gap import linear_top_gap

op, n, d, v, dtype, options = json.loads(sys.argv[1])
torch.set_num_threads(2)

stats = HeadStats()

def resident(which):
    status = Path("/proc/self/status").read_text()
    return int(status.split(which + ":")[1].split()[0]) * 1024

def call(hidden, weight, bias, labels):
    if op == "soft_values":
        return linear_soft_values(hidden, weight, bias=bias, kappa=0.7, **options), []
    teacher = hidden.detach(), weight.detach()
    if op == "cached":
        rows, entropy = torch.zeros(1).expand(len(hidden), d), torch.zeros(len(hidden))
        return linear_cached_forward_kl(hidden, teacher[1], rows, entropy), []
    if op == "streamed":
        return linear_divergence(hidden, teacher[1], *teacher), []
    if op == "top_gap":
        gap = linear_top_gap(hidden, weight, *teacher)
        return gap, torch.autograd.grad(gap.sum(), (hidden, weight))
    if op == "sparse":
        options.update(grad_mode="sparse", max_tail=1.0, stats=stats)
    if op == "frozen":
        weight, bias = weight.detach(), bias.detach()
    leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
    if op == "fused":
        pairs = min(options["pairs"], len(hidden) // 2)
        bounds = torch.arange(2 * pairs + 1) * (len(hidden) // (2 * pairs))
        loss = fused_linear_tvkd_loss(
            hidden, weight, labels, bounds, policy_bias=bias, ref_logps=torch.zeros(2 * pairs), alpha=0.0
        ).loss
        return loss, torch.autograd.grad(3 * loss, leaves)
    logps = linear_logps(hidden, weight, labels, bias=bias, **options)
    return logps, torch.autograd.grad(logps.sum(), leaves)

def inputs(n, v):
    made = [torch.empty(size, dtype=getattr(torch, dtype)).uniform_(-1, 1) for size in ((n, d), (v, d), (v,))]
    return *(x.requires_grad_() for x in made), torch.randint(v, (n,))

# The first call makes the libraries' own buffers and threads, which are nobody's inputs.
call(*inputs(64, 2048))
arguments = inputs(n, v)
arguments[3][::5] = -100
stats.reset()
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
result, gradients = call(*arguments)
peak = resident("VmHWM")
kept = sum(x.numel() * x.element_size() for x in (result, *gradients))
if stats.sums is not None:
    tokens, entries, _, _, dense = stats.sums.tolist()
    assert dense < tokens / 2, f"{dense:.0f} of {tokens:.0f} rows are dense: this measures the exact gradient"
    kept += entries * (16 if options.get('softcap') else 12)
print(json.dumps(peak - before - kept))
"""


def beyond(op: str, n: int, d: int, v: int, dtype: str = "float32", **options: Any) -> float:
    """Peak resident memory of a call beyond its inputs, result and gradients, in MiB, in a process of its own."""
    try:
        with CLEAR_REFS.open("w"):
            pass
    except OSError as why:
        pytest.skip(f"peak memory is reset through {CLEAR_REFS}, which cannot be written here: {why}")
    arguments = json.dumps([op, n, d, v, dtype, options])
    done = subprocess.run([sys.executable, "-c", MEASURE, arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout) / MEBI


@pytest.mark.each_once("slow")
@pytest.mark.parametrize("transforms", [{}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_logits_is_ever_made(kit: SimpleNamespace, dtype: torch.dtype, transforms: dict[str, Any]) -> None:
    case = kit.case(300, 8, 700, dtype, bias=True, **transforms)
    workspace = 4096
    largest_by_right = max(case.hidden.numel(), case.weight.numel(), workspace)
    assert 20 * largest_by_right < 300 * 700
    with kit.tile_sizes(workspace, 64), kit.Watch() as watch:
        kit.run(linear_logps, case)
        kit.run(linear_logps, case, frozen=True)
        kit.run(partial(linear_logps, grad_mode="sparse", eps=2.0**-9, max_tail=1.0), case)
        linear_soft_values(case.hidden, case.weight, bias=case.bias, kappa=0.7, **transforms)
    assert 0 < watch.largest <= largest_by_right


@pytest.mark.slow
def test_a_float32_head_stays_within_64_mb(record_property: Any) -> None:
    used = beyond("logps", 4096, 256, 128_256)
    record_property("mebibytes", used)
    assert used <= 64


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "options"), [("float32", {}), ("bfloat16", {"softcap": 30.0})], ids=str)
def test_four_times_the_tokens_take_no_more(dtype: str, options: dict[str, Any], record_property: Any) -> None:
    few, many = (beyond("logps", n, 256, 1024, dtype, **options) for n in (4096, 16_384))
    record_property("mebibytes", (few, many))
    assert few <= 64
    assert many <= 64
    assert many - few <= 16


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "options"), [("float32", {}), ("bfloat16", {"softcap": 30.0})], ids=str)
def test_a_frozen_head_keeps_its_gradient_in_float32(dtype: str, options: dict[str, Any], record_property: Any) -> None:
    """dlogp/dh lives from the forward to the backward, where it is multiplied into hidden's gradient."""
    used = beyond("frozen", 4096, 1024, 1024, dtype, **options)
    record_property("mebibytes", used)
    assert used <= 64 + 4096 * 1024 * 4 / MEBI


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["cached", "streamed"])
def test_a_derivative_that_is_kept_takes_no_more_than_itself_and_128_mb(
    op: str, dtype: str, record_property: Any
) -> None:
    used = beyond(op, 16_384, 2048, 64, dtype)
    record_property("mebibytes", used)
    assert used <= 128 + 16_384 * 2048 * 4 / MEBI


@pytest.mark.slow
@pytest.mark.parametrize(("n", "d", "v"), [(4, 1024, 131_072), (16_384, 1024, 1024)], ids=["few", "many"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_top_gaps_stay_within_their_blocks(n: int, d: int, v: int, dtype: str, record_property: Any) -> None:
    """Of 16 bits also states and the weight's gradient in float32."""
    used = beyond("top_gap", n, d, v, dtype)
    record_property("mebibytes", used)
    assert used <= (64 if dtype == "float32" else 128 + 4 * (n + v) * d / MEBI)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "d", "v", "dtype", "options"),
    [
        (4096, 256, 32_768, "float32", {}),
        (4096, 256, 32_768, "bfloat16", {"softcap": 30.0}),
        (16_384, 256, 4096, "float32", {"tail": "unbiased"}),
    ],
    ids=str,
)
def test_a_sparse_head_holds_its_entries_and_64_mb(
    n: int, d: int, v: int, dtype: str, options: dict[str, Any], record_property: Any
) -> None:
    used = beyond("sparse", n, d, v, dtype, eps=2.0**-10, **options)
    record_property("mebibytes", used)
    assert used <= 64


@pytest.mark.slow
def test_entries_are_held_once(record_property: Any) -> None:
    """Test 360 per token, as a trained model has: four times the tokens add 40 MiB of them."""
    few, many = (beyond("sparse", n, 96, 16_384, eps=2.0**-12, row_cap=16_384) for n in (4096, 16_384))
    record_property("mebibytes", (few, many))
    assert many <= 64
    assert many - few <= 25


def test_soft_values_stay_within_64_mb(record_property: Any) -> None:
    used = beyond("soft_values", 2048, 128, 8192, softcap=30.0)
    record_property("mebibytes", used)
    assert used <= 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "d", "dtype", "options"),
    [
        (4096, 1024, "bfloat16", {}),
        (4096, 1024, "bfloat16", {"softcap": 30.0}),
        (8192, 1024, "bfloat16", {}),
        (4096, 1024, "float32", {"softcap": 30.0}),
        (16_384, 256, "float32", {}),
        (4096, 256, "float64", {}),
    ],
    ids=str,
)
def test_full_vocabularies_stay_within_64_mb(
    n: int, d: int, dtype: str, options: dict[str, Any], record_property: Any
) -> None:
    used = beyond("logps", n, d, 128_256, dtype, **options)
    record_property("mebibytes", used)
    assert used <= 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "d", "v", "pairs"), [(2048, 256, 128_256, 16), (8192, 1024, 16_384, 1)], ids=["short", "2x4096"]
)
def test_a_loss_whose_gradient_is_made_in_the_forward_stays_within_128_mb(
    n: int, d: int, v: int, pairs: int, record_property: Any
) -> None:
    """The logits alone would take 1,002 and 512 MB."""
    used = beyond("fused", n, d, v, pairs=pairs)
    record_property("mebibytes", used)
    assert used <= 128
