"""Does the teacher's value help a small student? Arms screened from one seed, finalists from five, beside DPO.

    python -m bench.learning --data TRAIN.jsonl.gz --eval HELD_OUT.jsonl.gz --json docs/results/learning.json
    python -m bench.learning --quick …        the same road in minutes; its figures mean nothing

Two processes of one thread each. Runs that are in the JSON file are passed over, so a study that was cut off goes on;
models and scores lie under --out. At most 60 runs: 13 arms on human preferences with the larger student, then DPO, the
paper's TVKD and the two arms with the largest margins over DPO where they were selected, in five seeds, there and on
the set whose truth is known with the smaller student, and DPO with the best of the three on human preferences with the
smaller one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.learning import cells
from bench.learning.arms import ARMS, DPO, TVKD
from bench.learning.cells import BUDGETS, QUICK, Cell
from bench.learning.report import ahead
from bench.learning.run import run, teachers
from bench.machine import made_by, write_report

LARGE, SMALL = 6, 3
SEEDS = range(5)
Job = tuple[Cell, str, int]


class Study:
    """Runs that are done, in one file, and those that are not."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.file = arguments, Path(arguments.json)
        self.out = Path(arguments.out) / ("quick" if arguments.quick else "whole")
        found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {"runs": []}
        if found["runs"] and found["quick"] != arguments.quick:
            raise SystemExit(f"{self.file} holds a study that is {'' if found['quick'] else 'not '}quick: name another")
        self.runs: list[dict[str, Any]] = found["runs"]
        self.seeds = SEEDS[:2] if arguments.quick else SEEDS
        self.large = Cell("human", LARGE, self.out, arguments.quick, screens=True)
        self.rule = Cell("rule", SMALL, self.out, arguments.quick)
        self.small = Cell("human", SMALL, self.out, arguments.quick)
        self.teachers: list[dict[str, Any]] = found.get("teachers", [])

    def prepare(self, pool: ProcessPoolExecutor) -> None:
        cells.make_base(self.out)
        for data in ("human", "rule"):
            cells.write_data(self.out, data, self.arguments.quick, self.arguments.data, self.arguments.eval)  # type: ignore[arg-type]
        every = (self.large, self.rule, self.small)
        made: list[Callable[[], None]] = [partial(cells.make_teacher, cell) for cell in (self.large, self.rule)]
        made += [partial(cells.make_student, cell) for cell in every]
        self._all(pool, made)
        kinds: tuple[Any, ...] = ("sums", "rewards")
        scored = [partial(cells.make_potential, cell, kind) for kind in kinds for cell in (self.large, self.rule)]
        splits = {cell: ("train", *cell.held_out) for cell in every}
        scored += [partial(cells.make_reference_scores, cell, split) for cell in every for split in splits[cell]]
        self._all(pool, scored)
        if not self.teachers:
            self.teachers = list(pool.map(teachers, (self.large, self.rule)))
            self.write()

    def _all(self, pool: ProcessPoolExecutor, jobs: Iterable[Callable[[], None]]) -> None:
        for done in as_completed([pool.submit(job) for job in jobs]):
            done.result()

    def walk(self, pool: ProcessPoolExecutor, jobs: list[Job]) -> None:
        """Those of the runs that are not there yet."""
        known = {(one["cell"], one["arm"], one["seed"]) for one in self.runs}
        left = [job for job in jobs if (job[0].name, *job[1:]) not in known]
        for done in as_completed([pool.submit(run, *job) for job in left]):
            self.runs.append(done.result())
            self.write()
            one = self.runs[-1]
            print(f"{len(self.runs):>3} {one['cell']}: {one['arm']}, seed {one['seed']}", flush=True)

    def finalists(self) -> list[str]:
        """DPO, the paper's, and the two with the largest margins where arms are selected."""
        others = [row for row in ahead(self.runs, self.large.name, "select") if row["arm"] not in (DPO, TVKD)]
        others.sort(key=lambda row: -row["margin"])
        return [DPO, TVKD, *(row["arm"] for row in others[:2])]

    def jobs(self) -> Iterable[list[Job]]:
        """Stage by stage, since what comes next hangs on what was found."""
        yield [(self.large, arm, 0) for arm in ARMS]
        finalists = self.finalists()
        for cell in (self.large, self.rule):
            yield [(cell, arm, seed) for seed in self.seeds for arm in finalists]
        rows = [row for row in ahead(self.runs, self.large.name, "report") if row["arm"] != DPO]
        best = max(rows, key=lambda row: row["margin"])["arm"]
        yield [(self.small, arm, seed) for seed in self.seeds for arm in (DPO, best)]

    def write(self) -> None:
        whole = {
            "quick": self.arguments.quick,
            "budgets": {data: vars(QUICK if self.arguments.quick else budget) for data, budget in BUDGETS.items()},
            "teachers": self.teachers,
            "runs": self.runs,
            "made_by": made_by(threads=2),
        }
        write_report(whole, self.file)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="HH-RLHF pairs to train and select on")
    parser.add_argument("--eval", type=Path, required=True, help="HH-RLHF pairs to report on")
    parser.add_argument("--json", required=True)
    parser.add_argument("--out", default="out/learning")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    study = Study(parser.parse_args())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(study.arguments.workers, context, torch.set_num_threads, (1,)) as pool:
        study.prepare(pool)
        for jobs in study.jobs():
            study.walk(pool, jobs)


if __name__ == "__main__":
    main()
