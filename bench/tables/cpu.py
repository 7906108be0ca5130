"""The tables of what was measured on a CPU: heads, sweeps, steps, ways, hot columns, learning, training."""

from __future__ import annotations

import math
import re
from statistics import mean
from typing import Any

from bench.tables.markdown import cell, error, markdown, provenance

HEADLINES = {
    "product": "the forward product alone, fastest of seven tilings",
    "eager log-softmax": "eager log-softmax",
    "Liger, fused DPO": "Liger's fused linear DPO, without a reference",
    "tvkd_fast, exact": "`linear_logps`, exact",
    "tvkd_fast, sparse 2^-16": '`linear_logps(grad_mode="sparse")`, ε = 2⁻¹⁶',
    "tvkd_fast, sparse 2^-14": '`linear_logps(grad_mode="sparse")`, ε = 2⁻¹⁴',
}


def head_table(report: dict[str, Any]) -> str:
    """The few rows that a first page has room for."""
    by_name = {row["name"]: row for row in report["results"]}
    rows = [[label, *_head_cells(by_name[name])] for name, label in HEADLINES.items() if name in by_name]
    return _head_markdown(rows, report)


def heads_table(report: dict[str, Any]) -> str:
    """Every contender, and what the sparse ones kept."""
    rows = [[_raised(row["name"]), *_head_cells(row)] for row in report["results"]]
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
    entries = markdown(["ε", "entries a token", "marked over kept", "mean tail", "dense rows"], kept)
    return _head_markdown(rows, report) + "\n\n" + entries


def _head_markdown(rows: list[list[str]], report: dict[str, Any]) -> str:
    memory = "memory beyond inputs and gradients"
    return _measured(["head, forward and backward", "time over the product", memory, "error of dH, dW"], rows, report)


def _measured(head: list[str], rows: list[list[str]], report: dict[str, Any]) -> str:
    peers = ", ".join(f"{name} {number}" for name, number in report["made_by"]["peers"].items() if number)
    runs = len(report["results"][-1].get("rounds", []))
    what = f"{report['shape']} {report['dtype']}, {report['states']}; medians of {runs} runs; {peers}"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def _head_cells(row: dict[str, Any]) -> list[str]:
    if "seconds" not in row:
        return [cell(row.get("wrong") or row["refused"]), "–", "–"]
    peak = f"{max(row['peak_mb'], 0.0):,.0f} MB" if "peak_mb" in row else "–"
    errors = ", ".join(error(row, name) for name in ("rel_err_dh", "rel_err_dw") if name in row) or "–"
    if errors == "–" and "err_nats" in row:
        errors = f"{row['err_nats']:.1e} nats"
    return [f"{row['over_floor']:.2f}", peak, errors]


def ways_table(report: dict[str, Any]) -> str:
    """A way a row, an ε a column; a dense block with the share of the entries that it holds."""
    results = report["results"]
    head = [
        "over the product",
        *(f"ε = 2^-{round(-math.log2(x['eps']))}, {x['entries']:,.0f} entries a token" for x in results),
    ]
    rows = []
    for name in results[0]["over_product"]:
        held = [f", holds {x['saved'][name]:.0%}" if name in x["saved"] else "" for x in results]
        rows.append([name, *(f"{x['over_product'][name]:.3f}{more}" for x, more in zip(results, held, strict=True))])
    what = f"{report['tokens']} tokens, {report['states']}; medians of {report['rounds']} runs"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def hot_table(report: dict[str, Any]) -> str:
    """A rule and number of hot columns a row, an ε two columns."""
    found = {(x["rule"], x["k"], x["log_eps"]): x for x in report["rows"]}
    log_eps = sorted({x["log_eps"] for x in report["rows"]})
    head = ["hot columns"]
    for k in log_eps:
        head += [f"ε = 2^-{k}: entries in them", "marked over true"]
    rows = []
    for rule, count in dict.fromkeys((x["rule"], x["k"]) for x in report["rows"]):
        cells = [f"{count:,}: {rule}"]
        for k in log_eps:
            x = found[rule, count, k]
            cells += [f"{x['held']:.0%}", f"{x['marked']:.2f}"]
        rows.append(cells)
    what = f"{report['looked_at']} of {report['tokens']} tokens, {report['states']}; counted, not timed"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def learning_table(report: dict[str, Any]) -> str:
    """Gradients of the first step, then what AdamW made of them, by kind of gradient."""
    steps = [f"step {k}" for k in report["steps"]]
    head = ["gradient", "dH", "dW", "signs of dW"]
    for step in steps:
        head += [f"{step}: labels", "vocabulary", "weight"]
    rows = []
    for row in report["rows"]:
        cells = [row["kind"], f"{row['dh']:.1e}", f"{row['dw']:.1e}", f"{row['signs']:.1%}"]
        for step in steps:
            cells += [f"{row[step][name]:.1%}" for name in ("label", "vocabulary", "weight")]
        rows.append(cells)
    what = f"{report['tokens']} tokens a step, AdamW, rate {report['lr']:g}; {report['states']}"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def values_table(report: dict[str, Any]) -> str:
    rows = [[_raised(row["name"]), *_head_cells(row)] for row in report["results"]]
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
        cells = [_raised(name), *(_point(row) for row in found)]
        if lines:
            line, floor = lines.get(name), points[0]["results"][0]["seconds"]
            cells += [f"{line['a'] / floor:.2f}", f"{line['worst']:.0%}"] if line else ["–", "–"]
        rows.append(cells)
    runs = len(points[0]["results"][-1].get("rounds", []))
    what = f"{points[0]['shape']} to {points[-1]['shape']}, {points[-1]['states']}; medians of {runs} runs"
    if report["axis"] == "entries":
        what = f"{points[0]['shape']}, made states; medians of {runs} runs"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def _point(row: dict[str, Any] | None) -> str:
    if row is None or "seconds" not in row:
        return "–" if row is None else cell(row.get("wrong") or row["refused"])
    return f"{row['over_floor']:.2f}" + (f", {max(row['peak_mb'], 0):,.0f} MB" if "peak_mb" in row else "")


def step_table(report: dict[str, Any]) -> str:
    """A trainer a row; what it is compared with is the last one."""
    yardstick = report["results"][-1]["name"]
    head = ["a whole step of DPO", f"speed over {yardstick}'s", "peak memory", "losses off", "gradient norm off"]
    rows = []
    for row in report["results"]:
        cells = [_raised(row["name"]), f"{row['speed_over_yardstick']:.2f}", f"{row['peak_mb']:,.0f} MB"]
        rows.append([*cells, f"{row['loss_off']:.0e}", f"{row['grad_norm_off']:.0e}"])
    made = report["made_by"]
    what = f"{report['model']}, {report['pairs']} pairs of {report['data']} of at most {report['max_length']} tokens, "
    what += (
        f"{report['pairs_per_step']} a step: {report['tokens']:,} tokens, {report['padded_tokens']:,} in padded rows, "
    )
    what += f"{report['response_tokens']:,} of them answers; medians over steps"
    if tried := report["trl_seconds_by_batch"]:
        best = min(tried, key=tried.__getitem__)
        ratios = ", ".join(f"{seconds / tried[best]:.2f} at {size}" for size, seconds in tried.items())
        what += f"; TRL takes {best} a micro-batch ({ratios}); trl {made['peers']['trl']}"
    return markdown(head, rows) + "\n" + provenance(made, what)


def teacher_table(report: dict[str, Any]) -> str:
    """What was measured of a teacher's price, beside what it may be."""
    trained, scored = report["training"], report["scoring"]
    low, high = trained["interval_ms"]
    difference = f"{trained['difference_ms']:+.2f} ms ({low:+.2f} to {high:+.2f})"
    rows = [
        ["scoring by two models: speed over their backbones and a product each", f"{scored['speed_over_floor']:.3f}"],
        [f"a step of TVKD on cached values, beyond DPO's {trained['dpo_ms']:.1f} ms on a cached reference", difference],
    ]
    what = f"scoring: {scored['model']}, {scored['pairs']} pairs of {report['data']}, {scored['states']:,} states; "
    what += f"training: a tiny model, {trained['steps']} steps of {trained['pairs_per_step']} pairs by either in turn; "
    what += "medians, of paired differences with their 95% interval"
    return markdown(["what the teacher costs", "measured"], rows) + "\n" + provenance(report["made_by"], what)


def profile_table(report: dict[str, Any]) -> str:
    rows = [[part, f"{share:.1%}"] for part, share in report["shares"].items()]
    shape = "x".join(map(str, report["largest_product"]))
    what = (
        f"{report['model']}, {report['pairs']} pairs of {report['data']}, {report['tokens']:,} tokens; the backbone's "
    )
    what += f"products run at {report['gflops']:.0f} GFLOP/s, the largest of them, {shape}, alone at "
    what += f"{report['gflops_alone']:.0f}"
    return markdown(["where a step's time goes", "share"], rows) + "\n" + provenance(report["made_by"], what)


def lengths_table(report: dict[str, Any]) -> str:
    """A length a row: speed and memory, ours and the peer's."""
    rows = []
    for point in report["points"]:
        ours, peer = point["results"][0], point["results"][-1]
        cells = [f"{point['length']:,}", f"{point['pairs_per_step']}", f"{ours['speed_over_yardstick']:.2f}"]
        rows.append([*cells, f"{ours['peak_mb']:,.0f} MB", f"{peer['peak_mb']:,.0f} MB"])
    first, made = report["points"][0], report["made_by"]
    peer = first["results"][-1]["name"]
    head = ["tokens a sequence", "pairs a step", f"speed over {peer}'s", "our peak memory", f"{peer}'s"]
    steps = first["pairs"] // first["pairs_per_step"]
    what = f"{first['model']}, pairs cut from the text of {first['data']}, {first['tokens'] // steps:,} tokens a step; "
    what += f"medians over {steps - 1} steps; trl {first['made_by']['peers']['trl']}"
    return markdown(head, rows) + "\n" + provenance(made, what)


def training_table(report: dict[str, Any]) -> str:
    """A kind of gradient a row: where the runs end, then how far they are from the exact run of their seed."""
    marks, last = list(report["rows"][0]["marks"]), str(report["steps"])
    head = ["gradient", "loss at the end", "held-out reward accuracy", "held-out margin, nats"]
    parts = [
        key
        for key in ("head_off", "backbone_off")
        if any(x is not None for x in report["rows"][-1]["marks"][last][key])
    ]
    head += [f"ΔW of the {key.removesuffix('_off')} off, step {mark}" for key in parts for mark in marks]
    head += ["training loss off", *(f"margins off, step {mark}" for mark in marks)]
    rows = []
    for row in report["rows"]:
        end = row["marks"][last]
        cells = [_raised(row["arm"]), f"{mean(row['loss']):.4f}"]
        cells += [f"{mean(end['accuracy']):.3f} ({_spread(end['accuracy'])})", f"{mean(end['margin']):+.3f}"]
        for key in (*parts, "margins_off"):
            if key == "margins_off":
                cells.append("–" if row["arm"] == "exact" else f"{mean(row['loss_off']):.1e}")
            found = [row["marks"][mark][key] for mark in marks]
            cells += ["–" if row["arm"] == "exact" else f"{mean(x):.2%}" for x in found]
        rows.append(cells)
    what = (
        f"{report['start']}; DPO, AdamW, rate {report['lr']:g}, {report['steps']} steps of {report['pairs']} pairs of "
    )
    what += (
        f"{report['data']}, {report['held_out']} held-out pairs; means over {len(report['rows'][0]['seeds'])} seeds; "
    )
    what += "ΔW off is ‖ΔW − ΔW*‖/‖ΔW*‖ against the exact run, loss off the root mean square over steps"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def soak_table(report: dict[str, Any]) -> str:
    """A place a row: kills, restarts that were right, and the longest that the other processes took to end."""
    head = ["killed", "times", "resumed bit for bit", "others ended within"]
    rows = []
    for place in sorted({kill["where"] for kill in report["kills"]}):
        kills = [kill for kill in report["kills"] if kill["where"] == place]
        longest = max(kill["ended_in_s"] for kill in kills)
        rows.append([place, str(len(kills)), str(sum(kill["exact"] for kill in kills)), f"{longest:.1f} s"])
    rows.append(["in all", str(len(report["kills"])), str(report["exact"]), f"{report['longest_end_s']:.1f} s"])
    same = "the final model is" if report["same_end"] else "**the final model is not**"
    what = f"{report['processes']} processes; {same} that of the undisturbed run, bit for bit"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def scaling_table(report: dict[str, Any]) -> str:
    """Counted by the planner: a layout a row."""
    head = ["processes", "sharded over", "replicas", "head", "held by each", "sent by each a step", "operations a byte"]
    rows = []
    for row in report["rows"]:
        cells = [
            f"{row['processes']:,}",
            f"{row['group']:,}",
            f"{row['processes'] // row['group']:,}",
            row["vocabulary"],
        ]
        cells += [f"{row['held_gib']:.1f} GiB", f"{row['sent_gib']:.1f} GiB", f"{row['flops_per_byte']:,.0f}"]
        rows.append(cells)
    what = (
        f"counted, nothing was run: {report['policy']}, scores on disk, {report['pairs']} pairs of "
        f"{report['tokens']:,} tokens a process and step, bfloat16 products, blocks recomputed"
    )
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def planned_table(report: dict[str, Any]) -> str:
    """What a dry run says of memory beside what runs took: a case a row."""
    head = ["a run on a CPU", "most is held"]
    for how in ("", ", memory returned"):
        head += [f"planned{how}", "held", "planned over held"]
    rows = []
    for row in report["rows"]:
        rows.append([row["name"], row["kept"]["moment"]])
        for how in ("kept", "returned"):
            planned = sum(row[how]["planned"].values())
            sizes = [f"{size / 2**30:.2f} GiB" for size in (planned, row[how]["held"])]
            rows[-1] += [*sizes, f"{row[how]['ratio']:.2f}"]
    what = f"{report['model']} or as many of its layers, DPO in rows of 2,048 tokens where nothing else is said"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def overhead_table(report: dict[str, Any]) -> str:
    head = ["a step in the loop", "a bare step", "difference, median", "95% of it", "goal"]
    low, high = report["interval_ms"]
    row = [f"{report[name]:.2f} ms" for name in ("loop_ms", "bare_ms", "overhead_ms")]
    row += [f"{low:.2f} to {high:.2f} ms", f"{report['goal_ms']:.2f} ms"]
    what = f"{report['steps']} steps of 8 pairs of a tiny policy, one process, a line of metrics every step"
    return markdown(head, [row]) + "\n" + provenance(report["made_by"], what)


def _spread(numbers: list[float]) -> str:
    return f"{min(numbers):.3f}–{max(numbers):.3f}"


def _raised(name: str) -> str:
    return re.sub(
        r"2\^-(\d+)", lambda found: "2⁻" + found[1].translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")), name
    )
