"""Step 2: every kernel by its own launcher, on one small ragged problem, its outputs poisoned and between guards.

A kernel that does not compile, crashes, leaves an entry unwritten, writes outside or is plainly off is a row here,
before anything that is built of it. Tolerances are wide; step 4 has the narrow ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.minutes.alone.head import HEAD, ONCE
from bench.minutes.alone.joint import JOINT
from bench.minutes.alone.problem import Problem
from bench.minutes.alone.sparse import SPARSE
from bench.minutes.cases import Case, Row, Scale, short
from bench.minutes.guards import Guarded


def cases(scale: Scale) -> list[Case]:
    # float16 compiles to nearly what bfloat16 does, and is a dtype of step 4.
    dtypes = (scale.dtypes[0], torch.float32)
    runs = [(name, x, run) for name, run in (HEAD | SPARSE | JOINT).items() for x in dtypes]
    runs += [(name, dtypes[0], run) for name, run in ONCE.items()]
    return [Case(name=f"{name}, {short(x)}", run=partial(guarded, scale, x, run)) for name, x, run in runs]


def guarded(scale: Scale, dtype: torch.dtype, run: Callable[[Problem], Row]) -> Row:
    """What a check returns, and `wrong` where a guard was touched."""
    with Guarded() as memory:
        row = run(Problem(scale, dtype, memory))
    if touched := memory.touched():
        row["wrong"] = "; ".join([*touched, *([row["wrong"]] if "wrong" in row else [])])
    return row
