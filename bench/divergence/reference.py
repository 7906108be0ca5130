"""The divergences of a student's and a teacher's states in float64, and the gradients of their means.

    python -m bench.divergence.reference STUDENT TEACHER REFERENCE

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.divergence.contenders import KINDS, whole
from bench.harness.checker import Reference
from bench.harness.states import States, load_states

BLOCK = 256
SMALL = 1.0
"""Nats up to which a value is checked absolutely."""


def in_blocks(
    kind: str, hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, *, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N,), and the gradients [N, D] and [V, D] of their mean, of whole logits of `block` rows at a time.

    In the inputs' dtype; the sums over blocks are float32's at least.
    """
    n, w = len(hidden), weight.detach().requires_grad_()
    precision = torch.promote_types(weight.dtype, torch.float32)
    values, by_hidden = hidden.new_empty(n), torch.empty_like(hidden)
    by_weight = torch.zeros_like(weight, dtype=precision)
    for rows in torch.arange(n, device=hidden.device).split(block):
        h = hidden[rows].detach().requires_grad_()
        one = whole(kind, h, w, teacher[rows], teacher_weight)
        dh, dw = torch.autograd.grad(one.sum() / n, (h, w))
        values[rows], by_hidden[rows] = one.detach(), dh
        by_weight += dw
    return values, by_hidden, by_weight


def compute(student: States, teacher: States) -> dict[str, Tensor]:
    """By kind: values (N,), dH [N, D] and dW [V, D]."""
    inputs = [x.double() for x in (student.hidden, student.weight, teacher.hidden, teacher.weight)]
    found: dict[str, Tensor] = {}
    for kind in KINDS:
        values, by_hidden, by_weight = in_blocks(kind, *inputs, block=BLOCK)
        found |= {f"{kind}.values": values, f"{kind}.hidden": by_hidden.float(), f"{kind}.weight": by_weight.float()}
    return found


def load_reference(file: Path, kind: str) -> Reference:
    found = load_file(file)
    values = found[f"{kind}.values"]
    small = (values <= SMALL).nonzero()[:, 0]
    numbers = {"mean": values.mean(), "hidden": found[f"{kind}.hidden"], "weight": found[f"{kind}.weight"]}
    numbers = {name: x.double() for name, x in numbers.items()}
    return Reference(numbers | {"values": values[small]}, {"values": small})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("reference", type=Path)
    arguments = parser.parse_args()
    save_file(compute(load_states(arguments.student), load_states(arguments.teacher)), arguments.reference)


if __name__ == "__main__":
    main()
