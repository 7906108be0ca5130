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


def lengths_table(report: dict[str, Any]) -> str:
    """A length a row: speed and memory, ours and the peer's."""
    rows = []
    for point in report["points"]:
        ours, peer = point["results"][0], point["results"][-1]
        cells = [f"{point['length']:,}", f"{point['pairs_per_step']}", f"{ours['speed_over_yardstick']:.2f}"]
        rows.append([*cells, f"{ours['peak_mb']:,.0f} MB", f"{peer['peak_mb']:,.0f} MB"])
    first, made = report["points"][0], report["made_by"]
    peer = first["results"][-1]["name"]
    head = ["tokens per sequence", "pairs per step", f"speed over {peer}'s", "our peak memory", f"{peer}'s"]
    steps = first["pairs"] // first["pairs_per_step"]
    what = (
        f"{first['model']}, pairs cut from the text of {first['data']}, {first['tokens'] // steps:,} tokens per step; "
    )
    what += f"medians over {steps - 1} steps; trl {first['made_by']['peers']['trl']}"
    return markdown(head, rows) + "\n" + provenance(made, what)


def profile_table(report: dict[str, Any]) -> str:
    rows = [[part, f"{share:.1%}"] for part, share in report["shares"].items()]
    shape = "x".join(map(str, report["largest_product"]))
    what = (
        f"{report['model']}, {report['pairs']} pairs of {report['data']}, {report['tokens']:,} tokens; the backbone's "
    )
    what += f"products run at {report['gflops']:.0f} GFLOP/s, the largest of them, {shape}, alone at "
    what += f"{report['gflops_alone']:.0f}"
    return markdown(["where a step's time goes", "share"], rows) + "\n" + provenance(report["made_by"], what)


def teacher_table(report: dict[str, Any]) -> str:
    """Return the table of the teacher's measured cost, beside its limit."""
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
