"""The table of a teacher's distributions from a cache."""

from __future__ import annotations

from typing import Any

from bench.tables.markdown import markdown, provenance

_DISTINCT = "sampled"


def caches_table(report: dict[str, Any]) -> str:
    """A row a cache: bytes, error, and of samples the error of the mean over many passes."""
    rows = [
        [
            row["name"],
            f"{row['bytes']:,.0f}",
            f"{row['error']:.1%}",
            f"{row['mean_error']:.1%}" if row["name"].startswith(_DISTINCT) else "the same",
        ]
        for row in report["caches"]
    ]
    passes = report["passes"]
    head = ["`--keep`", "bytes a token", "error of p − q", f"of the mean of {passes} passes"]
    teacher, student = (report[whose].split(" over ")[0] for whose in ("teacher", "student"))
    what = f"{report['tokens']:,} {teacher}, p {student.removeprefix('states ')}"
    return markdown(head, rows) + "\n" + provenance(report["made_by"], what)
