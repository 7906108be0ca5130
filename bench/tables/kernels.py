"""Tables of the kernels: what the compiler made of them, times on a GPU, and errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.census.epilogue import issue_cycles, plain_rows
from bench.tables.markdown import cell, error, markdown, provenance

FROZEN = (
    "Frozen head: the weight wants no gradient, and dW is neither asked for nor checked; the product is the same one. "
    "Forward alone, of inputs that want no gradient, is that of the row whose head is not frozen. CCE skips nothing."
)


def gpu_table(report: dict[str, Any]) -> str:
    """Return one table per shape; a contender that was wrong or refused has a row too, with the reason."""
    head = ["forward and backward over the product", "forward over it", "memory, MB", "errors of logps, dH, dW"]
    parts = []
    for measured in report["shapes"]:
        rows = [_gpu_row(row) for row in measured.get("rows", [])]
        if "refused" in measured:
            rows.append([f"not measured: {cell(measured['refused'])}", "–", "–", "–", "–"])
        parts.append(markdown([f"{measured['shape']} {measured['dtype']}", *head], rows))
        if products := measured.get("products"):
            ratios = (
                f"{row['name']} {row['over_cublas']:.2f}"
                if "over_cublas" in row
                else f"{row['name']} {_not_timed(row)}"
                for row in products
            )
            parts.append(f"Our products over cuBLAS: {'; '.join(ratios)}.")
    if any("frozen head" in row["name"] for measured in report["shapes"] for row in measured.get("rows", [])):
        parts.append(FROZEN)
    what = f"{report['device']}, driver {report['driver']}, {report['toolkit']}; {report['rounds']} rounds"
    return "\n\n".join(parts) + "\n" + provenance(report["made_by"], what)


def _gpu_row(row: dict[str, Any]) -> list[str]:
    errors = row.get("errors")
    shown = ", ".join(error(errors, name) for name in ("logps", "hidden", "weight")) if errors else "–"
    if "both_over_product" not in row:
        return [f"{row['name']}: {_not_timed(row)}", "–", "–", "–", shown]
    forward = f"{row['forward_over_product']:.2f}" if "forward_over_product" in row else "–"
    return [row["name"], f"{row['both_over_product']:.2f}", forward, f"{row['both_peak_mb']:,.0f}", shown]


def _not_timed(row: dict[str, Any]) -> str:
    return f"wrong: {cell(row['wrong'])}" if "wrong" in row else cell(row["refused"])


def numerics_table(report: dict[str, Any]) -> str:
    """Return one table per case, dtype by dtype, and how often the strict rule does not hold."""
    parts = []
    for case in dict.fromkeys(row["case"] for row in report["rows"]):
        rows = [
            [row["implementation"], row["dtype"], *(error(row, name) for name in ("logps", "hidden", "weight"))]
            for row in report["rows"]
            if row["case"] == case
        ]
        parts.append(markdown([case, "dtype", "logps, nats", "dH", "dW"], rows))
    rules = [
        [
            rule["shape"],
            f"{rule['broken']['strict']} of {rule['seeds']}",
            f"{rule['broken']['rounded_once']} of {rule['seeds']}",
            *(f"{rule['worst'][name]:.1e}" for name in ("error", "strict", "rounded_once")),
        ]
        for rule in report["strict_rule"]
    ]
    head = ["float16, dH", "beyond the strict rule", "beyond the tests' rule", "worst", "strict allows", "tests allow"]
    what = f"{report['shape']}; kernels on {report['kernels_ran_on']}, TF32 emulated"
    return "\n\n".join([*parts, markdown(head, rules)]) + "\n" + provenance(report["made_by"], what)


_BUILD = ("kernel", "target", "dtype", "variant")
_TILE = ("block_m", "block_n", "block_k", "warps", "stages")
_FACTS = (
    *("registers", "stack", "spills", "shared", "programs", "tensor", "bulk_loads", "wide_loads", "exps", "length"),
    "epilogue",
)
_TENSOR_FLOPS = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}
"""Dense bf16 operations of a multiprocessor a cycle."""


def census_kept(report: dict[str, Any]) -> dict[str, Any]:
    """A census without the fields that none of its tables reads."""
    rows = [{"build": _build(x["build"]), "facts": {name: x["facts"][name] for name in _FACTS}} for x in report["rows"]]
    rejected = [{"build": _build(x["build"]), "broken": x["broken"]} for x in report["rejected"]]
    return report | {"rows": rows, "rejected": rejected}


def _build(build: dict[str, Any]) -> dict[str, Any]:
    config = build["config"]
    tile = None if config is None else {name: config[name] for name in _TILE}
    return {name: build[name] for name in _BUILD} | {"config": tile}


def census_table(report: dict[str, Any]) -> str:
    """A fold an architecture; kernels in bf16 and float32, since float16 compiles to nearly what bf16 does."""
    rows = report["rows"]
    targets = list(dict.fromkeys(row["build"]["target"] for row in rows))
    head = ["binaries", "worst registers", "stack, spills", "most shared memory", "matrix instructions"]
    summary = []
    for target in targets:
        facts = [row["facts"] for row in rows if row["build"]["target"] == target]
        matrix = sorted({name for x in facts for name in x["tensor"]})
        summary.append(
            [
                target,
                str(len(facts)),
                str(max(x["registers"] for x in facts)),
                f"{max(x['stack'] for x in facts)}, {max(x['spills'] for x in facts)}",
                f"{max(x['shared'] for x in facts) / 1024:.0f} KiB",
                ", ".join(matrix),
            ]
        )
    made = report["made_by"]
    parts = [markdown(["architecture", *head], summary), provenance(made, f"Triton {made['triton']}, no GPU")]
    parts += [_census_fold(target, [row for row in rows if row["build"]["target"] == target]) for target in targets]
    return "\n".join(parts)


def _census_fold(target: str, rows: list[dict[str, Any]]) -> str:
    """A line per binary of whole steps; of the rest, and of kernels without a product, a line per tile, with ranges."""
    head = ["kernel", "variant", "dtype", "tile", "warps, stages", "registers", "KiB", "fit", "matrix", "bulk", "16 B"]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        build, config = row["build"], row["build"]["config"]
        if build["dtype"] == "fp16":
            continue
        tile = f"{config['block_m']}×{config['block_n']}×{config['block_k']}" if config else "–"
        shape = f"{config['warps']}, {config['stages']}" if config else "–"
        masked = next((kind for kind in ("odd D", "unaligned") if kind in build["variant"]), "")
        variant = build["variant"] if config and not masked else masked
        groups.setdefault((build["kernel"], variant, build["dtype"], tile, shape), []).append(row["facts"])
    lines = []
    for (kernel, variant, *cells), facts in groups.items():
        many = len(facts) > 1 or not variant
        named = f"{len(facts)} binaries{', ' * bool(variant)}{variant}" if many else variant
        matrix = "–"
        if names := sorted({name for x in facts for name in x["tensor"]}):
            matrix = ", ".join(f"{name} {_range(x['tensor'].get(name, 0) for x in facts)}" for name in names)
        numbers = [_range(x["registers"] for x in facts), _range(round(x["shared"] / 1024) for x in facts)]
        numbers += [_range(x["programs"] for x in facts), matrix]
        numbers += [_range(x[name] for x in facts) for name in ("bulk_loads", "wide_loads", "exps", "length")]
        lines.append([kernel, named, *cells, *numbers])
    table = markdown([*head, "exp", "instructions"], lines)
    return f"\n<details><summary>{target}</summary>\n\n{table}\n\n</details>"


def _range(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    low, high = ordered[0], ordered[-1]
    return str(low) if low == high else f"{low}–{high}"


def epilogues_table(report: dict[str, Any]) -> str:
    """What is issued behind a tile's product, beside the product's own cycles."""
    lines = []
    for row in plain_rows(report):
        build, config = row["build"], row["build"]["config"]
        if build["target"] not in _TENSOR_FLOPS:
            continue
        count = row["facts"]["epilogue"]
        cycles = issue_cycles(count, config["warps"])
        tile = config["block_m"] * config["block_n"]
        shares = [f"{cycles * _TENSOR_FLOPS[build['target']] / (2 * tile * d):.1%}" for d in (576, 2048, 4096)]
        shape = f"{config['block_m']}×{config['block_n']}, {config['warps']} warps"
        lines.append([build["kernel"], build["target"], shape, f"{count:,}", f"{cycles:,}", *shares])
    head = ["kernel, bf16", "architecture", "tile", "instructions behind its product", "cycles to issue them"]
    made = report["made_by"]
    table = markdown([*head, "over the product's, D = 576", "D = 2,048", "D = 4,096"], lines)
    return f"{table}\n" + provenance(made, f"Triton {made['triton']}, compiled and counted, not timed")


def rejected_table(report: dict[str, Any]) -> str:
    rows = []
    for row in report["rejected"]:
        build, config = row["build"], row["build"]["config"]
        tile = f"{config['block_m']}×{config['block_n']}×{config['block_k']}, {config['warps']} warps"
        what = f"{build['kernel']}, {build['variant']}, {build['dtype']}"
        rows.append([what, build["target"], f"{tile}, {config['stages']} stages", "; ".join(row["broken"])])
    return markdown(["kernel", "architecture", "tile", "breaks"], rows)


GOALS = {
    "loss known": ("exact, coefficients known", 3.2),
    "exact": ("exact, unknown upstream, within 1 GiB", 3.6),
    "exact, exponentials kept": ("exact, unknown upstream, exponentials kept (`workspace_mb`)", 3.6),
    "frozen head": ("frozen head", 2.3),
    "values": ("values", 1.15),
    "sparse 2^-14": ("sparse, 2⁻¹⁴, 300 entries per token", 1.5),
}
"""What a row of the model is called in the table of goals, and the most that it is to take."""
GOALS_AT = ("H200 SXM", [8192, 4096, 128256])


def goals_table(report: dict[str, Any]) -> str:
    """The model's products at the goals' chip and shape, beside the goals."""
    found = {x["algorithm"]: x for x in report["estimates"] if (x["chip"], x["shape"]) == GOALS_AT}
    rows = []
    for algorithm, (name, goal) in GOALS.items():
        x = found[f"tvkd_fast, {algorithm}"]
        rows.append([name, f"{goal:g}", f"{x['over_product']:.2f}", f"{x['held_mib']:,.0f} MiB"])
    head = ["8192×4096×128,256, H200", "goal", "by the model", "held beyond inputs and gradients"]
    return markdown(head, rows) + "\n" + provenance(report["made_by"], "a model, not a measurement")


def model_table(report: dict[str, Any]) -> str:
    head = ["shape", "chip", "algorithm", "products", "forward", "backward", "whole over a product", "memory held"]
    rows = [
        [
            "x".join(map(str, x["shape"])),
            x["chip"],
            x["algorithm"],
            f"{x['products']:.1f}",
            f"{x['forward_ms']:.2f} ms",
            f"{x['backward_ms']:.2f} ms",
            f"{x['over_product']:.2f}",
            f"{x['held_mib']:,.0f} MiB" if x["held_mib"] else "–",
        ]
        for x in report["estimates"]
    ]
    note = "\n- ".join(["\nA model, not a measurement. It assumes:\n", *report["assumptions"]])
    return f"{markdown(head, rows)}\n{provenance(report['made_by'], 'Counted, not measured')}\n{note}"
