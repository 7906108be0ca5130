"""The limits of 16-bit contenders: how far plain torch in the inputs' dtype is from float64 over the very inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        """`judged` of what jobs find when they are run once."""
        return self.judged(contender, {name: job.check() for name, job in jobs.items()})

    def judged(self, contender: Contender, numbers: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        """Errors of values and gradients, and what they may be at most; "wrong" where one is more.

        `numbers` are of `both`, forward and backward, and of `forward` alone where that is to be checked too. A frozen
        head is asked for no gradient by weight. A fused loss gives rewards, and is compared by its gradients, which
        are those of DPO over the same pairs.
        """
        of_loss = contender.task == "pairs"
        reference, limits = self.of("preference" if of_loss else contender.task)
        named = dict(zip(contender.numbers, numbers["both"], strict=True))
        errors = reference.errors({name: x for name, x in named.items() if name in GRADIENTS or not of_loss})
        if "forward" in numbers:
            (values,) = numbers["forward"]
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
