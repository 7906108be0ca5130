"""Does the teacher's value help a small student? Arms screened from one seed, finalists from five, beside DPO.

    python -m bench.learning --data TRAIN.jsonl.gz --eval HELD_OUT.jsonl.gz --json out/learning/study.json
    python -m bench.learning --quick …        the same in minutes; its figures mean nothing

Two processes of one thread each. Runs that are in the JSON file are skipped, so that a study that was cut off resumes;
models and scores lie under --out. 58 runs: 13 arms from one seed on half of the human preferences; DPO, the paper's
TVKD and two finalists, from five other seeds on all of them and other pairs; DPO, the paper's and the first of the
finalists on the set that a rule judges; and DPO and the paper's on human preferences, with a smaller student. What a
stage needs is made when it begins, so --stages 1 is the screen alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness.machine import made_by, write_report
from bench.learning import cells
from bench.learning.arms import ARMS, DPO, TVKD, finalists
from bench.learning.cells import BUDGETS, QUICK, Cell, Split
from bench.learning.picture import picture
from bench.learning.report import ahead
from bench.learning.run import run, settings, teachers

LARGE, SMALL = 6, 3
SCREENED, SEEDS = 0, range(1, 6)
"""Arms are selected from one seed, and compared from others."""
SPLITS: tuple[Split, ...] = ("train", "held_out")


class Study:
    """Runs that are done, in one file, and those that are not."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.file = arguments, Path(arguments.json)
        self.out = Path(arguments.out) / ("quick" if arguments.quick else "whole")
        self.given: dict[str, Any] = {
            "quick": arguments.quick,
            "budgets": {data: vars(QUICK if arguments.quick else budget) for data, budget in BUDGETS.items()},
            "sha256": {
                name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
                for name, file in (("data", arguments.data), ("eval", arguments.eval))
            },
        }
        found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else self.given
        for name, value in self.given.items():
            if found[name] != value:
                raise SystemExit(f"{self.file} holds a study of another {name}: give another --json, or what it had")
        if not all("pairs" in one for one in found.get("runs", [])):
            raise SystemExit(f"{self.file} is a kept report without its pairs: give the file that the study wrote")
        self._check_models()
        self.runs: list[dict[str, Any]] = found.get("runs", [])
        self.teachers: list[dict[str, Any]] = found.get("teachers", [])
        self.data: dict[str, Any] = found.get("data", {})
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.seeds = SEEDS[:2] if arguments.quick else SEEDS
        self.screened = Cell("screen", LARGE, self.out, arguments.quick)
        self.large = Cell("human", LARGE, self.out, arguments.quick)
        self.known = Cell("rule", SMALL, self.out, arguments.quick)
        self.small = Cell("human", SMALL, self.out, arguments.quick)
        self.commit = made_by()["commit"]

    def _check_models(self) -> None:
        """Models and scores that lie there are of this study, with all that they were made by."""
        file, made = self.out / "given.json", json.loads(json.dumps(self.given | {"settings": settings()}))
        if not file.exists() and not self.out.exists():
            write_report(made, file)
        elif not file.exists() or json.loads(file.read_text()) != made:
            raise SystemExit(f"{self.out} holds models of another study: give another --out, or delete it")

    def prepare(self, pool: ProcessPoolExecutor, cell: Cell, arms: Iterable[str]) -> None:
        """The cell's teacher and student, and their numbers that the arms ask for; each once."""
        arguments = self.arguments
        cells.make_base(self.out)
        cells.write_data(self.out, cell.data, arguments.quick, arguments.data, arguments.eval)
        self._all(pool, [partial(cells.make_teacher, cell), partial(cells.make_student, cell)])
        kinds = sorted({kind for arm in arms if (kind := ARMS[arm].potential)})
        scored = [partial(cells.make_potential, cell, kind) for kind in kinds]
        self._all(pool, scored + [partial(cells.make_reference_scores, cell, split) for split in SPLITS])
        self.data[cell.data] = {split: vars(cell.dataset(split).report) | {"source": split} for split in SPLITS}
        if cell.data not in {one["data"] for one in self.teachers}:
            self.teachers.append(pool.submit(teachers, cell).result())

    def _all(self, pool: ProcessPoolExecutor, jobs: Iterable[Callable[[], None]]) -> None:
        for done in as_completed([pool.submit(job) for job in jobs]):
            done.result()

    def run_cells(self, pool: ProcessPoolExecutor, cell: Cell, arms: Iterable[str], seeds: Iterable[int]) -> None:
        """Run those of the runs that have no result yet."""
        known = {(one["cell"], one["arm"], one["seed"]) for one in self.runs}
        left = [(arm, seed) for seed in seeds for arm in arms if (cell.name, arm, seed) not in known]
        if left:
            self.prepare(pool, cell, arms)
        jobs = [pool.submit(run, cell, arm, seed) for arm, seed in left]
        try:
            for done in as_completed(jobs):
                self.runs.append(done.result() | {"commit": self.commit})
                self.write()
                one = self.runs[-1]
                print(f"{len(self.runs):>3} {one['cell']}: {one['arm']}, seed {one['seed']}", flush=True)
        except BaseException:
            # The results of those that wait would not be kept.
            for job in jobs:
                job.cancel()
            raise
        self.tell()

    def screen(self, pool: ProcessPoolExecutor) -> None:
        self.run_cells(pool, self.screened, ARMS, [SCREENED])

    def finals(self, pool: ProcessPoolExecutor) -> None:
        self.run_cells(pool, self.large, (DPO, TVKD, *self.finalists()), self.seeds)

    def rule(self, pool: ProcessPoolExecutor) -> None:
        self.run_cells(pool, self.known, (DPO, TVKD, self.finalists()[0]), self.seeds)

    def smaller(self, pool: ProcessPoolExecutor) -> None:
        self.run_cells(pool, self.small, (DPO, TVKD), self.seeds)

    def finalists(self) -> list[str]:
        """Return the finalists by the screening, which no table of finalists reports on."""
        return finalists(self.rows[self.screened.name])

    def tell(self) -> None:
        """Every arm beside DPO, cell by cell."""
        cells = (self.screened, self.large, self.known, self.small)
        self.rows = {cell.name: ahead(self.runs, cell.name) for cell in cells}
        self.write()

    def write(self) -> None:
        found = {"data": self.data, "teachers": self.teachers, "rows": self.rows, "runs": self.runs}
        write_report(self.given | found | {"made_by": made_by(threads=2)}, self.file)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="HH-RLHF pairs to train and select on")
    parser.add_argument("--eval", type=Path, required=True, help="HH-RLHF pairs to report on")
    parser.add_argument("--json", required=True)
    parser.add_argument("--out", default="out/learning")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stages", type=int, default=4, help="1 to 4: screen, finals, set by rule, smaller student")
    parser.add_argument("--workers", type=int, default=2)
    study = Study(parser.parse_args())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(study.arguments.workers, context, torch.set_num_threads, (1,)) as pool:
        for stage in (study.screen, study.finals, study.rule, study.smaller)[: study.arguments.stages]:
            stage(pool)
    if study.arguments.stages > 1:
        picture(study.file)


if __name__ == "__main__":
    main()
