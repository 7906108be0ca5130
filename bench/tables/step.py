"""Tables of whole steps on a CPU: speed, lengths, a profile, what the teacher costs."""

from __future__ import annotations

from typing import Any

from bench.tables.markdown import cell, markdown, provenance, raised


def step_table(report: dict[str, Any]) -> str:
    """A trainer a row; what it is compared with is the last one."""
    yardstick = [row["name"] for row in report["results"] if "pairs_per_s" in row][-1]
    head = ["a whole step of DPO", f"speed over {yardstick}'s", "peak memory", "losses off", "gradient norm off"]
    rows = []
    for row in report["results"]:
        if refusal := row.get("refused") or row.get("wrong"):
            rows.append([f"{raised(row['name'])}: {cell(refusal)}", "–", "–", "–", "–"])
            continue
        cells = [raised(row["name"]), f"{row['speed_over_yardstick']:.2f}", f"{row['peak_mb']:,.0f} MB"]
        rows.append([*cells, f"{row['loss_off']:.0e}", f"{row['grad_norm_off']:.0e}"])
    made = report["made_by"]
    what = f"{report['model']}, {report['pairs']} pairs of at most {report['max_length']} tokens, "
    what += f"{report['pairs_per_step']} per step; medians"
    return markdown(head, rows) + "\n" + provenance(made, what)


def lengths_table(report: dict[str, Any]) -> str:
    """A length a row: speed and memory, ours and the peer's."""
    rows = []
    for point in report["points"]:
        ours, peer = point["results"][0], point["results"][-1]
        cells = [f"{point['length']:,}", f"{point['pairs_per_step']}", f"{ours['speed_over_yardstick']:.2f}"]
        sizes = [f"{ours['peak_mb']:,.0f} MB", f"{peer['peak_mb']:,.0f} MB"]
        rows.append([*cells, *sizes, f"{ours['peak_mb'] / peer['peak_mb']:.2f}"])
    first, made = report["points"][0], report["made_by"]
    peer = first["results"][-1]["name"]
    head = ["tokens per sequence", "pairs per step", f"speed over {peer}'s", "our memory", f"{peer}'s", "ratio"]
    steps = first["pairs"] // first["pairs_per_step"]
    what = f"{first['model']}, {first['tokens'] // steps:,} tokens per step; medians of {steps - 1}"
    if report.get("alike"):
        what = f"{what}; one pair in a micro-batch of either"
    return markdown(head, rows) + "\n" + provenance(made, what)


def profile_table(report: dict[str, Any]) -> str:
    """A part a row: its share of a step, and of the compiled step, in the plain step's time."""
    compiled, over = report["compiled"]["shares"], report["compiled"]["over_plain"]
    rows = [[part, f"{share:.1%}", f"{compiled[part] * over:.1%}"] for part, share in report["shares"].items()]
    rows.append(["all of it", "100.0%", f"{over:.1%}"])
    shape = "x".join(map(str, report["largest_product"]))
    what = f"{report['model']}, {report['pairs']} pairs, {report['tokens']:,} tokens"
    speeds = f"The backbone's products run at {report['gflops']:.0f} GFLOP/s; the largest, {shape}, runs alone at "
    speeds += f"{report['gflops_alone']:.0f} GFLOP/s."
    table = markdown(["where a step's time goes", "plain", "`--model.compile`"], rows)
    return f"{table}\n\n{speeds}\n{provenance(report['made_by'], what)}"


def teacher_table(report: dict[str, Any]) -> str:
    """What was measured of a teacher's price, beside what it may be."""
    trained, scored = report["training"], report["scoring"]
    low, high = trained["interval_ms"]
    difference = f"{trained['difference_ms']:+.2f} ms ({low:+.2f} to {high:+.2f})"
    rows = [
        ["scoring by two models: speed over their backbones and a product each", f"{scored['speed_over_floor']:.3f}"],
        [f"a step of TVKD on cached values, beyond DPO's {trained['dpo_ms']:.1f} ms on a cached reference", difference],
    ]
    what = f"Scoring: {scored['model']}, {scored['pairs']} pairs, {scored['states']:,} states. Training: a tiny model, "
    what += f"{trained['steps']} steps of {trained['pairs_per_step']} pairs by either in turn."
    medians = provenance(report["made_by"], "medians of paired differences with their 95% interval")
    return f"{markdown(['what the teacher costs', 'measured'], rows)}\n\n{what}\n{medians}"
