"""Tables of heads on a CPU: contenders, sweeps, variants and dense columns."""

from __future__ import annotations

import math
from typing import Any

from bench.tables.markdown import cell, error, markdown, provenance, raised, states_of

HEADLINES = {
    "product": "the forward product alone, fastest of seven tilings",
    "eager log-softmax": "eager log-softmax",
    "Liger, fused DPO": "Liger's fused linear DPO, without a reference",
    "CCE, torch_compile": "Cut Cross-Entropy, its torch.compile version",
    "tvkd_fast, exact": "`linear_logps`, exact, for any loss",
    "tvkd_fast, fused loss, exact": "`fused_linear_tvkd_loss` and a training step, exact",
    "tvkd_fast, sparse 2^-16": '`linear_logps(grad_mode="sparse")`, ε = 2⁻¹⁶',
    "tvkd_fast, sparse 2^-14": '`linear_logps(grad_mode="sparse")`, ε = 2⁻¹⁴',
}


def head_table(report: dict[str, Any]) -> str:
    """Return the few rows that the first page shows."""
    by_name = {row["name"]: row for row in report["results"]}
    rows = [[label, *_head_cells(by_name[name])] for name, label in HEADLINES.items() if name in by_name]
    return _head_markdown(rows, report)


def heads_table(report: dict[str, Any]) -> str:
    """Every contender, and what the sparse ones kept."""
    rows = [[raised(row["name"]), *_head_cells(row)] for row in report["results"]]
    kept = [
        [
            eps,
            f"{x['head_entries']:,.0f}",
            f"{x['head_marked']:.2f}" if x["head_entries"] else "–",
            f"{x['head_tail']:.3f}",
            f"{x['head_dense_rows']:.1%}",
        ]
        for eps, x in report["entries"].items()
    ]
    entries = markdown(["ε", "entries per token", "selected over kept", "mean tail", "dense rows"], kept)
    return _head_markdown(rows, report) + "\n\n" + entries


def _head_markdown(rows: list[list[str]], report: dict[str, Any]) -> str:
    memory = "memory beyond inputs and gradients"
    return _measured(["head, forward and backward", "time over the product", memory, "error of dH, dW"], rows, report)


def _measured(head: list[str], rows: list[list[str]], report: dict[str, Any]) -> str:
    runs = len(report["results"][-1].get("rounds", []))
    what = f"{report['shape']} {report['dtype']}, {states_of(report)}; medians of {runs} runs"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def _head_cells(row: dict[str, Any]) -> list[str]:
    if "seconds" not in row:
        return [cell(row.get("wrong") or row["refused"]), "–", "–"]
    peak = f"{max(row['peak_mb'], 0.0):,.0f} MB" if "peak_mb" in row else "–"
    errors = ", ".join(error(row, name) for name in ("rel_err_dh", "rel_err_dw") if name in row) or "–"
    if errors == "–" and "err_nats" in row:
        errors = f"{row['err_nats']:.1e} nats"
    return [f"{row['over_floor']:.2f}", peak, errors]


def divergences_table(report: dict[str, Any]) -> str:
    """Every contender of student and teacher; the unit is the student's forward product."""
    rows = [[raised(row["name"]), *_head_cells(row)] for row in report["results"]]
    head = ["forward and backward", "time over the forward product", "memory beyond inputs and gradients"]
    runs = max(len(row.get("rounds", [])) for row in report["results"])
    what = f"{report['shape']} {report['dtype']}, student: {report['student']}, teacher: {report['teacher']}"
    table = markdown([*head, "error of dH, dW"], rows)
    return table + "\n" + provenance(report["made_by"], f"{what}; medians of {runs} runs")


def values_table(report: dict[str, Any]) -> str:
    rows = [[raised(row["name"]), *_head_cells(row)] for row in report["results"]]
    head = ["values, forward alone", "time over the product", "memory beyond inputs and result", "error"]
    return _measured(head, rows, report)


def sweep_table(report: dict[str, Any]) -> str:
    """A contender a row, a point two columns; along the tokens, the line through its seconds."""
    points, unit = report["points"], {"tokens": "N", "vocabulary": "V", "entries": "entries"}[report["axis"]]
    head = ["time over the product, memory", *(f"{unit} = {x['value']:,}" for x in points)]
    lines = report.get("fits")
    if lines:
        head += ["a, products of 512 tokens", "worst point off a + b·N"]
    rows = []
    for name in dict.fromkeys(row["name"] for x in points for row in x["results"]):
        found = [next((row for row in x["results"] if row["name"] == name), None) for x in points]
        cells = [raised(name), *(_point(row) for row in found)]
        if lines:
            line, product = lines.get(name), points[0]["results"][0]["seconds"]
            cells += [f"{line['a'] / product:.2f}", f"{line['worst']:.0%}"] if line else ["–", "–"]
        rows.append(cells)
    runs = len(points[0]["results"][-1].get("rounds", []))
    start = "" if report["axis"] == "entries" else "from "
    what = f"{start}{points[0]['shape']}, {states_of(points[-1])}; medians of {runs} runs"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def _point(row: dict[str, Any] | None) -> str:
    if row is None or "seconds" not in row:
        return "–" if row is None else cell(row.get("wrong") or row["refused"])
    return f"{row['over_floor']:.2f}" + (f", {max(row['peak_mb'], 0):,.0f} MB" if "peak_mb" in row else "")


def variants_table(report: dict[str, Any]) -> str:
    """A row per variant, a column per ε; a dense block with the share of the entries that it holds."""
    results = report["results"]
    head = [
        "over the product",
        *(f"ε = 2^-{round(-math.log2(x['eps']))}, {x['entries']:,.0f} entries per token" for x in results),
    ]
    rows = []
    for name in results[0]["over_product"]:
        held = [f", holds {x['saved'][name]:.0%}" if name in x["saved"] else "" for x in results]
        rows.append([name, *(f"{x['over_product'][name]:.3f}{more}" for x, more in zip(results, held, strict=True))])
    what = f"{report['tokens']} tokens, {states_of(report)}; medians of {report['rounds']} runs"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def dense_columns_table(report: dict[str, Any]) -> str:
    """A row per rule and number of dense columns, two columns per ε."""
    found = {(x["rule"], x["k"], x["log_eps"]): x for x in report["rows"]}
    log_eps = sorted({x["log_eps"] for x in report["rows"]})
    head = ["dense columns"]
    for k in log_eps:
        head += [f"ε = 2^-{k}: entries in them", "selected over true"]
    rows = []
    for rule, count in dict.fromkeys((x["rule"], x["k"]) for x in report["rows"]):
        cells = [f"{count:,}: {rule}"]
        for k in log_eps:
            x = found[rule, count, k]
            cells += [f"{x['held']:.0%}", f"{x['marked']:.2f}"]
        rows.append(cells)
    states = states_of(report).removeprefix("states of ")
    what = f"{report['looked_at']} of {report['tokens']} tokens, {states}; counted, not timed"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)
