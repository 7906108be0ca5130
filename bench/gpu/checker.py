"""Whether a contender of `bench.gpu` is right: float32's results, and how far from them it may be."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from bench.gpu.contenders import Contender, chunked
from bench.harness.inputs import Inputs, Objective, both, forward, weighted

SLACK = 16.0
"""A contender is wrong where its error is this many times the error of plain torch in the same dtype."""
SKIPPED = 0.1
"""The error of gradients that is let through where a contender skips small ones by design."""


def error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        raise ValueError(f"result of shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    return float((got.float() - want).norm() / want.norm())


Truth = dict[str, tuple[Tensor, float]]
"""By name: what float32 gives, and the error that a contender's may have."""


class Judge:
    """Float32's results for one shape, and how far plain torch in the inputs' dtype is from them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.known: dict[Objective, Truth] = {weighted: self._truth(weighted)}

    def _truth(self, objective: Objective) -> Truth:
        run = partial(objective, chunked)
        want = both(run, self.inputs.float())
        yardstick = [error(*pair) for pair in zip(both(run, self.inputs), want, strict=True)]
        limited = [(x, SLACK * e + 1e-5) for x, e in zip(want, yardstick, strict=True)]
        truth = dict(zip(("logps", "hidden", "weight"), limited, strict=True))
        return truth | {"logps of forward only": truth["logps"]}

    def row(self, contender: Contender) -> dict[str, Any]:
        """Errors of values and gradients, and what they may be at most; "wrong" where one is more.

        A frozen head is asked for no gradient by weight, and its forward alone is judged where it is not frozen.
        """
        if contender.objective not in self.known:
            self.known[contender.objective] = self._truth(contender.objective)
        truth = self.known[contender.objective]
        gradients = ("hidden",) if contender.frozen else ("hidden", "weight")
        got = dict(zip(("logps", *gradients), both(contender.run, contender.given(self.inputs)), strict=True))
        if not contender.frozen:
            (got["logps of forward only"],) = forward(contender.run, self.inputs.detached())
        errors = {name: error(x, truth[name][0]) for name, x in got.items()}
        limits = {name: truth[name][1] for name in got}
        if contender.skips:
            limits |= {name: max(limits[name], SKIPPED) for name in gradients}
        row: dict[str, Any] = {"errors": errors, "limits": limits}
        if off := [name for name in got if not errors[name] <= limits[name]]:
            row["wrong"] = f"{', '.join(off)} beyond what rounding explains"
        return row
