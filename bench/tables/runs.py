"""Tables of whole training runs: the demo, kills, the loop's overhead, plans and scaling."""

from __future__ import annotations

from typing import Any

from bench.tables.markdown import markdown, provenance


def demo_table(report: dict[str, Any]) -> str:
    judged = "judged" in report["start"]
    head = ["model", "accuracy", "margin, nats", "reward accuracy", *(["good answers"] if judged else [])]
    rows = []
    for name, label in (("start", "student at the start"), ("dpo", "DPO"), ("tvkd", "TVKD"), ("teacher", "teacher")):
        row = report[name]
        reward = "–" if row.get("reward_accuracy") is None else f"{row['reward_accuracy']:.3f}"
        cells = [
            label,
            f"{row['accuracy']:.3f} ± {row['accuracy_ci']:.3f}",
            f"{row['margin']:+.2f} ± {row['margin_ci']:.2f}",
            reward,
        ]
        rows.append(cells + ([f"{row['judged']:.2f}"] if judged else []))
    return markdown(head, rows) + "\n" + provenance(report["made_by"], f"{report['pairs']} held-out pairs")


def shaping_table(report: dict[str, Any]) -> str:
    row = report["tvkd"]
    head = ["shaping at the end of the TVKD run", "held-out pairs"]
    rows = [
        ["mean αΔΨ", f"{row['shaping_margin']:+.4f}"],
        ["std(αΔΨ)/std(βΔρ)", f"{row['shaping_std_ratio']:.3f}"],
        ["correlation of αΔΨ with the length difference", f"{row['shaping_length_correlation']:+.3f}"],
        ["pairs whose sign αΔΨ flips", f"{row['shaping_flipped']:.1%}"],
    ]
    return markdown(head, rows)


def soak_table(report: dict[str, Any]) -> str:
    """A place a row: kills, restarts that were right, and the longest that the other processes took to end."""
    head = ["killed", "times", "resumed bit for bit", "others ended within"]
    rows = []
    for place in sorted({kill["where"] for kill in report["kills"]}):
        kills = [kill for kill in report["kills"] if kill["where"] == place]
        longest = max(kill["ended_in_s"] for kill in kills)
        rows.append([place, str(len(kills)), str(sum(kill["exact"] for kill in kills)), f"{longest:.1f} s"])
    rows.append(["in all", str(len(report["kills"])), str(report["exact"]), f"{report['longest_end_s']:.1f} s"])
    same = "is" if report["same_end"] else "**is not**"
    what = f"{report['processes']} processes; the final model {same} the undisturbed run's, bit for bit"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def selection_table(report: dict[str, Any]) -> str:
    """An arm a row: what an update takes, and the held-out figures after the same number of them where there are."""
    head = ["selection", "pairs taken, kept", "s per update", "times none's"]
    head += ["held-out reward accuracy", "held-out loss"] if report["held_out"] else []
    none = report["rows"][0]["seconds"]
    rows = []
    for row in report["rows"]:
        cells = [
            "none" if row["select"] == "no" else f"{row['select']}, ratio {row['ratio']:g}",
            f"{row['taken']}, {row['kept']}",
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / none:.2f}",
        ]
        if row["held_out"] is not None:
            cells += [f"{row['held_out']['reward_accuracy']:.3f}", f"{row['held_out']['loss']:.4f}"]
        rows.append(cells)
    return markdown(head, rows) + "\n" + provenance(report["made_by"], f"{report['steps']} updates each")


def scaling_table(report: dict[str, Any]) -> str:
    """Counted by the planner: a layout a row."""
    head = ["processes", "sharded over", "replicas", "head"]
    head += ["held by each", "sent by each per step", "operations per byte"]
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
    what = f"counted, not run: {report['policy']}"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def planned_table(report: dict[str, Any]) -> str:
    """Memory that a dry run plans beside what runs took: a row per case."""
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
    what = f"{report['model']} or as many of its layers; rows of 2,048 tokens"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)


def overhead_table(report: dict[str, Any]) -> str:
    head = ["a step in the loop", "a bare step", "difference, median", "95% of it", "goal"]
    low, high = report["interval_ms"]
    row = [f"{report[name]:.2f} ms" for name in ("loop_ms", "bare_ms", "overhead_ms")]
    row += [f"{low:.2f} to {high:.2f} ms", f"{report['goal_ms']:.2f} ms"]
    what = f"{report['steps']} steps of 8 pairs of a tiny policy, one process"
    return markdown(head, [row]) + "\n" + provenance(report["made_by"], what)


def compat_table(report: dict[str, Any]) -> str:
    """An environment a row: its versions, and what the first tier of tests says there."""
    rows = []
    for row in report["rows"]:
        found = row["versions"]
        names = [found[name] for name in ("torch", "triton", "transformers", "peft", "numpy")]
        counts = [f"{row.get(name, 0):,}" for name in ("passed", "failed", "skipped", "refused")]
        rows.append([*map(str, names), *counts])
    head = ["torch", "Triton", "transformers", "peft", "NumPy", "passed", "failed", "skipped", "refused"]
    return markdown(head, rows) + "\n" + provenance(report["rows"][-1]["made_by"], "the first tier of tests")
