"""A head's log-probabilities and gradients in float64, kept beside the states: contenders are checked against them.

    python -m bench.harness.reference STATES REFERENCE

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.harness.checker import Reference
from bench.harness.inputs import BETA, PAIRS, Task
from bench.harness.states import States, load_states

WHOLE = 32 * 2**20
"""The size from which only an even selection of a weight's rows is checked, and of dH's."""
CHECKED_COLUMNS, CHECKED_ROWS = 4096, 256
BLOCK = 512


@dataclass(frozen=True)
class HeadReference:
    """Log-probabilities of all rows; dH of `rows` and dW of `columns`, for the states' coefficients and for DPO's, of
    four pairs of equal length and of the pairs that the tokens are of."""

    logps: Tensor
    rows: Tensor
    columns: Tensor
    by_hidden: Tensor
    by_weight: Tensor
    preference_by_hidden: Tensor
    preference_by_weight: Tensor
    pairs_by_hidden: Tensor
    pairs_by_weight: Tensor

    def of(self, task: Task, states: States) -> Reference:
        """Return this task's reference; contenders that go backward from DPO's loss are checked by gradients."""
        if task == "values":
            own = (states.hidden.double() * states.weight[states.labels].double()).sum(1)
            return Reference({"lse": own - self.logps})
        rows = {"hidden": self.rows, "weight": self.columns}
        if task == "preference":
            return Reference({"hidden": self.preference_by_hidden, "weight": self.preference_by_weight}, rows)
        if task == "pairs":
            return Reference({"hidden": self.pairs_by_hidden, "weight": self.pairs_by_weight}, rows)
        return Reference({"logps": self.logps, "hidden": self.by_hidden, "weight": self.by_weight}, rows)

    @property
    def extent(self) -> str:
        return f"{len(self.rows)} rows of dH, {len(self.columns)} of dW"


def compute(states: States) -> HeadReference:
    (n, _, v), weight = states.shape, states.weight.double()
    whole = states.weight.numel() <= WHOLE
    columns = torch.arange(v) if whole else torch.linspace(0, v - 1, CHECKED_COLUMNS).long()
    rows = torch.arange(n) if whole else torch.linspace(0, n - 1, CHECKED_ROWS).long()
    lse = torch.cat([(h.double() @ weight.T).logsumexp(1) for h in states.hidden.split(BLOCK)])
    own = (states.hidden.double() * weight[states.labels]).sum(1)
    logps = own - lse
    coefficients = [states.coefficients.double()]
    # Pairs of equal length are cut from the tokens; a count that does not divide has no DPO.
    coefficients.append(preference_coefficients(logps) if n % 8 == 0 else torch.zeros(n, dtype=torch.float64))
    coefficients.append(pair_coefficients(logps, states.lengths))
    by_hidden = [torch.zeros(len(rows), states.shape[1], dtype=torch.float64) for _ in coefficients]
    by_weight = [torch.zeros(len(columns), states.shape[1], dtype=torch.float64) for _ in coefficients]
    wanted = torch.full((n,), -1)
    wanted[rows] = torch.arange(len(rows))
    for block in torch.arange(n).split(BLOCK):
        h, label = states.hidden[block].double(), states.labels[block]
        here = (wanted[block] >= 0).nonzero()[:, 0]
        if whole:
            g = -(h @ weight.T - lse[block, None]).exp_()
            g[torch.arange(len(block)), label] += 1
            by_logits = g @ weight
            for c, dh, dw in zip(coefficients, by_hidden, by_weight, strict=True):
                dh[block] = by_logits * c[block, None]
                dw.addmm_(g.T, h * c[block, None])
            continue
        g = -(h @ weight[columns].T - lse[block, None]).exp_() + (label[:, None] == columns).double()
        for c, dw in zip(coefficients, by_weight, strict=True):
            dw.addmm_(g.T, h * c[block, None])
        if len(here):
            g = -(h[here] @ weight.T - lse[block[here], None]).exp_()
            g[torch.arange(len(here)), label[here]] += 1
            by_logits = g @ weight
            for c, dh in zip(coefficients, by_hidden, strict=True):
                dh[wanted[block[here]]] = by_logits * c[block[here], None]
    return HeadReference(logps, rows, columns, *chain.from_iterable(zip(by_hidden, by_weight, strict=True)))


def preference_coefficients(logps: Tensor) -> Tensor:
    """(N,) dL/dlogp of DPO without a reference, the mean over four pairs of equal lengths, chosen first."""
    return pair_coefficients(logps, torch.full((2 * PAIRS,), len(logps) // (2 * PAIRS)))


def pair_coefficients(logps: Tensor, lengths: Tensor) -> Tensor:
    """The same over responses of these lengths, (2P,)."""
    chosen, rejected = torch.stack([x.sum() for x in logps.split(lengths.tolist())]).chunk(2)
    by_pair = -BETA * torch.sigmoid(-BETA * (chosen - rejected)) / len(chosen)
    return torch.cat([by_pair, -by_pair]).repeat_interleave(lengths)


def load_reference(file: Path) -> HeadReference:
    return HeadReference(**load_file(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("states", type=Path)
    parser.add_argument("reference", type=Path)
    arguments = parser.parse_args()
    with torch.no_grad():
        reference = compute(load_states(arguments.states))
    save_file({name: tensor.contiguous() for name, tensor in vars(reference).items()}, arguments.reference)
    print(f"float64: {reference.extent}")


if __name__ == "__main__":
    main()
