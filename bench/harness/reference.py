"""What float64 says of a head's gradients, kept beside the states: contenders are held to it before they are timed.

    python -m bench.harness.reference STATES TRUTH

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.harness.inputs import PAIRS, sequences
from bench.harness.states import States, load_states

WHOLE = 32 * 2**20
"""Of a larger weight an even selection of rows is judged, and of dH rows by such a selection too."""
CHECKED_COLUMNS, CHECKED_ROWS = 4096, 256
BLOCK = 512
BETA = 0.1
"""Of the DPO loss that a contender may go backward from."""


@dataclass(frozen=True)
class Truth:
    """Log-probabilities of all rows; dH of `rows` and dW of `columns`, for the states' coefficients and for DPO's."""

    logps: Tensor
    rows: Tensor
    columns: Tensor
    by_hidden: Tensor
    by_weight: Tensor
    preference_by_hidden: Tensor
    preference_by_weight: Tensor

    @property
    def extent(self) -> str:
        return f"{len(self.rows)} rows of dH, {len(self.columns)} of dW"


def compute(states: States) -> Truth:
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
    return Truth(logps, rows, columns, by_hidden[0], by_weight[0], by_hidden[1], by_weight[1])


def preference_coefficients(logps: Tensor) -> Tensor:
    """(N,) dL/dlogp of DPO without a reference, the mean over four pairs of equal lengths, chosen first."""
    chosen, rejected = sequences(logps).sum(1).chunk(2)
    by_pair = -BETA * torch.sigmoid(-BETA * (chosen - rejected)) / PAIRS
    return torch.cat([by_pair, -by_pair]).repeat_interleave(len(logps) // (2 * PAIRS))


def errors(
    truth: Truth, states: States, got: tuple[Tensor, ...], *, forward: bool = False, preference: bool = False
) -> dict[str, float]:
    """Of log-probabilities, or of values where only those were asked for, the largest error in nats; of gradients the
    relative error in Frobenius' norm. What goes backward from a loss of its own has no log-probabilities to judge.
    """
    found = {}
    if not preference:
        want = truth.logps
        if forward:
            want = (states.hidden.double() * states.weight[states.labels].double()).sum(1) - truth.logps
        found["err_nats"] = float((got[0].double() - want).abs().max())
    wanted = (truth.by_hidden, truth.by_weight)
    if preference:
        wanted = (truth.preference_by_hidden, truth.preference_by_weight)
    names = (("rel_err_dh", truth.rows), ("rel_err_dw", truth.columns))
    for (name, where), grad, want in zip(names, got[1:], wanted, strict=False):
        found[name] = float((grad[where].double() - want).norm() / want.norm())
    return found


def load_truth(file: Path) -> Truth:
    return Truth(**load_file(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("states", type=Path)
    parser.add_argument("truth", type=Path)
    arguments = parser.parse_args()
    with torch.no_grad():
        truth = compute(load_states(arguments.states))
    save_file({name: tensor.contiguous() for name, tensor in vars(truth).items()}, arguments.truth)
    print(f"float64: {truth.extent}")


if __name__ == "__main__":
    main()
