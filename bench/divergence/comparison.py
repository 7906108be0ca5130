"""Divergences on a CPU: each in a process of its own, checked against float64, then timed in rounds beside the product.

In its first run a contender's mean, its values up to one nat and its gradients are checked, and its peak memory is
read (VmHWM, reset before, beyond inputs, result and gradients); what is wrong is not timed further. The unit is the
student's forward product, as in `bench.head.comparison`, timed before each run. Linux only.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.divergence.contenders import Contender, on_cpu
from bench.divergence.reference import load_reference
from bench.harness.checker import checked
from bench.harness.contenders import selected
from bench.harness.machine import made_by, versions, write_report
from bench.harness.meters import Call, CpuMeter, Job
from bench.harness.states import States, load_states, save_states
from bench.head.comparison import (
    FOLDER,
    PACKAGED,
    checked_row,
    fastest_tiling,
    prepared_states,
    product,
    timed_rows,
)

KEYS = {"mean": "err_mean_nats", "values": "err_nats", "hidden": "rel_err_dh", "weight": "rel_err_dw"}
"""A report's names of errors."""
NOISE = 0.3
"""Of made states, how far the student's lie from the teacher's, over their spread."""


def call(contender: Contender, student: States, teacher: States) -> Call:
    """Forward and backward of the mean: it, values where there are any, and the student's gradients."""
    hidden, weight = student.hidden.clone().requires_grad_(), student.weight.requires_grad_(not contender.frozen)
    of_teacher = contender.prepare(weight, teacher.hidden, teacher.weight)

    def run(rows: slice, columns: slice) -> dict[str, Tensor]:
        h, w = (
            (hidden, weight) if rows.stop is None else (x.detach()[y] for x, y in ((hidden, rows), (weight, columns)))
        )
        wanted = {"hidden": h.requires_grad_()}
        if not contender.frozen:
            wanted["weight"] = w.requires_grad_()
        mean, values = contender.run(h, w, of_teacher[0][rows], of_teacher[1][columns])
        grads = torch.autograd.grad(mean, list(wanted.values()))
        found = {"mean": mean.detach(), **dict(zip(wanted, grads, strict=True))}
        return found if values is None else found | {"values": values}

    # The libraries' threads and buffers, and what they compile, are made before: they are not a contender's memory.
    whole = slice(None)
    run(*((whole, whole) if contender.compiles else (slice(0, 64), slice(0, 4096))))
    # The inputs' pages, shared with the parent, count once they have been touched.
    weight.detach().sum() + teacher.weight.sum() + teacher.hidden.sum()
    return partial(run, whole, whole)


def check(contender: Contender, reference: Path, got: dict[str, Tensor]) -> dict[str, Any]:
    found = checked(load_reference(reference, contender.kind).errors(got), contender.limits)
    row: dict[str, Any] = {KEYS[name]: error for name, error in found["errors"].items()}
    return row | ({"wrong": found["wrong"]} if "wrong" in found else {})


def measure(
    student: States, teacher: States, reference: Path, chosen: dict[str, Contender], rounds: int, threads: int
) -> dict[str, Any]:
    meter = CpuMeter(threads)
    search = meter.start(lambda: partial(fastest_tiling, student.hidden, student.weight), lambda found: found)
    tiling = search.check()
    search.close()
    unit = meter.start(lambda: partial(product, student.hidden, student.weight, tiling), id)
    unit.check()
    rows: dict[str, dict[str, Any]] = {}
    jobs: dict[str, Job] = {}
    taken: dict[str, list[tuple[float, float]]] = {}
    results = student.hidden.numel() + len(student.hidden)
    for name, contender in chosen.items():
        rows[name] = {"name": name, "kind": contender.kind}
        if contender.refusal:
            rows[name]["refused"] = contender.refusal
            continue
        job: Job = meter.start(partial(call, contender, student, teacher), partial(check, contender, reference))
        before = unit.seconds()
        rows[name] |= checked_row(job, 4 * (results + (0 if contender.frozen else student.weight.numel())))
        if rows[name].keys() & {"refused", "wrong"}:
            job.close()
            continue
        jobs[name], taken[name] = job, [(before, job.seconds())]
    for name, timed in timed_rows(jobs, taken, rounds, unit.seconds).items():
        rows[name] |= timed
    unit.close()
    return {"tiling": tiling, "results": list(rows.values())}


def prepared_pair(
    shape: tuple[int, int, int], *, model: str, data: str, layers: int, student_model: str | None = None
) -> tuple[Path, Path]:
    """Files of the student's states and of the teacher's, made where they do not exist yet."""
    teacher = prepared_states(shape, model=model, data=data)
    if shape[1:] == PACKAGED:
        if student_model is not None:
            return prepared_states(shape, model=student_model, data=data), teacher
        return prepared_states(shape, model=model, data=data, layers=layers), teacher
    student = teacher.with_name(teacher.name.replace("states", "student"))
    if not student.exists():
        states = load_states(teacher)
        noise = torch.randn(states.hidden.shape, generator=torch.Generator().manual_seed(2))
        hidden = states.hidden + NOISE * states.hidden.std() * noise
        save_states(replace(states, hidden=hidden, source=f"{states.source}, the student's moved at random"), student)
    return student, teacher


def prepared_reference(student: Path, teacher: Path) -> Path:
    """The file of these states' float64 numbers, likewise."""
    key = sha256(f"{student.name} {teacher.name}".encode()).hexdigest()[:12]
    file = FOLDER / f"divergence-{key}.safetensors"
    if not file.exists():
        files = [str(x) for x in (student, teacher, file)]
        subprocess.run([sys.executable, "-m", "bench.divergence.reference", *files], check=True)
    return file


def command(description: str | None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.divergence", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="4096x576x49152", help="tokens x hidden x vocabulary, of both models")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each, the checked one among them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", default="bundled:train", help="pairs to take states from, of made ones lengths")
    parser.add_argument("--model", default="smollm2-135m", help="a model of the packaged one's shape")
    parser.add_argument("--layers", type=int, default=24, help="of the teacher's layers, those that the student keeps")
    parser.add_argument(
        "--student", help="a student's folder, of the packaged model's shape, in place of a pruned model"
    )
    parser.add_argument("--only", action="append", help="a contender's name, or a part of names; may be repeated")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if platform.system() != "Linux":
        raise SystemExit("peak memory is read from /proc: run this on Linux")
    n, d, v = (int(x) for x in arguments.shape.split("x"))
    files = prepared_pair(
        (n, d, v),
        model=arguments.model,
        data=arguments.data,
        layers=arguments.layers,
        student_model=arguments.student,
    )
    reference = prepared_reference(*files)
    torch.set_num_threads(1)
    student, teacher = (load_states(file) for file in files)
    chosen = selected(on_cpu(), arguments.only)
    report = {"shape": arguments.shape, "dtype": "float32", "threads": arguments.threads}
    report |= {"student": student.source, "teacher": teacher.source}
    report |= {"mean_nats": {kind: float(load_reference(reference, kind).numbers["mean"]) for kind in _kinds(chosen)}}
    report |= measure(student, teacher, reference, chosen, arguments.rounds, arguments.threads)
    peers = versions("trl", "liger-kernel", "numba")
    report["made_by"] = made_by(arguments.threads) | {"peers": peers, "threads": arguments.threads}
    print(f"{arguments.shape}, student: {student.source}; teacher: {teacher.source}")
    for row in report["results"]:
        print(text(row))
    write_report(report, arguments.json)


def _kinds(chosen: dict[str, Contender]) -> list[str]:
    return list(dict.fromkeys(x.kind for x in chosen.values()))


def text(row: dict[str, Any]) -> str:
    """Return one contender's line."""
    if "seconds" not in row:
        return f"{row['name']:<48} {row.get('wrong') or row.get('refused')}"
    errors = "  ".join(f"{key.removeprefix('rel_err_')} {row[key]:.1e}" for key in KEYS.values() if key in row)
    return f"{row['name']:<48} {row['over_floor']:6.2f} x the product {row['peak_mb']:8,.0f} MB  {errors}"
