"""The limits of 16-bit contenders: how far plain torch in the inputs' dtype is from float64 over the very inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.harness.checker import GRADIENTS, Reference, checked
from bench.harness.inputs import Head, Inputs, Task, both
from bench.harness.meters import Job
from bench.head.contenders import TASKS, Contender
from bench.head.peers import eager

CHUNK = 1024
"""Rows whose logits are held at once."""
SLACK = 16.0
"""A contender is wrong where its error is this many times the error of plain torch in the same dtype."""
SKIPPED = 0.1
"""The error of gradients that is let through where a contender skips small ones by design."""


class RoundingChecker:
    """float64 over the very inputs, and as limits what plain torch in the inputs' dtype is off."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._known: dict[Task, tuple[Reference, dict[str, float]]] = {}

    def of(self, task: Task) -> tuple[Reference, dict[str, float]]:
        if task not in self._known:
            names = ("logps", "hidden", "weight")
            exact = both(partial(TASKS[task], partial(in_chunks, logps)), self.inputs.double())
            reference = Reference(dict(zip(names, exact, strict=True)))
            plain = both(partial(TASKS[task], partial(in_chunks, eager)), self.inputs)
            errors = reference.errors(dict(zip(names, plain, strict=True)))
            self._known[task] = reference, {name: SLACK * error + 1e-5 for name, error in errors.items()}
        return self._known[task]

    def row(self, contender: Contender, jobs: Mapping[str, Job]) -> dict[str, Any]:
        """Errors of values and gradients, and what they may be at most; "wrong" where one is more.

        A frozen head is asked for no gradient by weight, and its forward alone is checked where it is not frozen.
        """
        reference, limits = self.of(contender.task)
        errors = reference.errors(dict(zip(contender.numbers, jobs["both"].check(), strict=True)))
        if "forward" in jobs:
            (values,) = jobs["forward"].check()
            errors |= {"logps of forward only": reference.errors({"logps": values})["logps"]}
        limits = limits | {"logps of forward only": limits["logps"]}
        if contender.skips:
            limits |= {name: max(limits[name], SKIPPED) for name in GRADIENTS}
        return checked(errors, limits)


def in_chunks(head: Head, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A head a few rows at a time, its logits recomputed in the backward."""
    rows = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat([checkpoint(head, h, weight, y, use_reentrant=False) for h, y in rows])


def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Eager log-softmax in the inputs' own dtype, which for a reference is float64."""
    return (hidden @ weight.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
