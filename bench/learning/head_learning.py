"""The cost in learning of leaving small softmax entries out: the head alone under AdamW, on real states.

    python -m bench.learning.head_learning --data PAIRS.jsonl.gz --json FILE

The states stand still and the head's weight learns from runs of tokens with alternating signs, as DPO's first steps
have it. Every kind of gradient goes through the same batches from the same weight; after 1, 10 and the last step its
change is compared with the exact gradient's: ‖ΔW − ΔW*‖/‖ΔW*‖, and the change in the log-probabilities of held-out
tokens, of the labels and of the whole vocabulary weighted by probability. The same for the gradients of the first step.

Letters: N tokens of a step, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.harness.machine import made_by, write_report
from bench.harness.states import load_states
from bench.head.comparison import prepared_states
from tvkd_fast import linear_logps

RUN = 32
"""Tokens that share a sign."""
Gradient = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""hidden [N, D], weight [V, D], labels, c (N,) and the step to dH and dW of Σ c·logp."""


def ours(**options: Any) -> Gradient:
    def gradient(h: Tensor, w: Tensor, labels: Tensor, c: Tensor, step: int) -> tuple[Tensor, Tensor]:
        seeded: dict[str, Any] = {"seed": step} if options.get("tail") == "unbiased" else {}
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        dh, dw = torch.autograd.grad((linear_logps(h, w, labels, **options, **seeded) * c).sum(), (h, w))
        return dh, dw

    return gradient


def rounded(*, logits: bool) -> Gradient:
    """Dense gradients with one step in bfloat16: the logits, or the gradient by them."""

    def gradient(h: Tensor, w: Tensor, labels: Tensor, c: Tensor, step: int) -> tuple[Tensor, Tensor]:
        z = h @ w.T
        if logits:
            z = z.bfloat16().float()
        g = z.softmax(1).neg_()
        g[torch.arange(len(labels)), labels] += 1
        g *= c[:, None]
        if not logits:
            g = g.bfloat16().float()
        return g @ w, g.T @ h

    return gradient


def kinds() -> dict[str, Gradient]:
    even = {f"even, 2^-{k}": ours(grad_mode="sparse", eps=2.0**-k, max_tail=1.0) for k in (10, 12, 14, 16, 18, 20)}
    unbiased = {
        f"unbiased, 2^-{k}": ours(grad_mode="sparse", eps=2.0**-k, max_tail=1.0, tail="unbiased") for k in (14, 16, 18)
    }
    bf16 = {"bf16 logits": rounded(logits=True), "bf16 dlogits": rounded(logits=False)}
    return {"exact": ours(), **even, **unbiased, **bf16}


def learn(
    gradient: Gradient, states: Any, steps: int, tokens: int, lr: float, milestones: list[int]
) -> dict[int, Tensor]:
    """The weight's change after the steps in `milestones`."""
    weight = torch.nn.Parameter(states.weight.clone())
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0, foreach=False, fused=True)
    found = {}
    count = len(states.hidden) // tokens
    for step in range(steps):
        which = slice(step % count * tokens, (step % count + 1) * tokens)
        signs = torch.where(torch.arange(tokens) // RUN % 2 == 0, 1.0, -1.0)
        _, dw = gradient(states.hidden[which], weight.detach(), states.labels[which], signs / tokens, step)
        weight.grad = dw.neg_()
        optimizer.step()
        if step + 1 in milestones:
            found[step + 1] = weight.detach() - states.weight
    return found


def changes(change: Tensor, states: Any, held: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Changes of held-out log-probabilities: of the labels, and of the vocabulary times the root of its probability."""
    now = (held.hidden @ (states.weight + change).T).log_softmax(1) - held.logp
    return now.gather(1, held.labels[:, None])[:, 0], now * held.root


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=384, help="a step")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--data", default="bundled:train")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--only", action="append", help="a part of a kind's name; may be repeated")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    total, held_out = 4096, 256
    everything = load_states(prepared_states((total, 576, 49152), model=arguments.model, data=arguments.data))
    states = SimpleNamespace(
        hidden=everything.hidden[:-held_out], labels=everything.labels[:-held_out], weight=everything.weight
    )
    held = SimpleNamespace(hidden=everything.hidden[-held_out:], labels=everything.labels[-held_out:])
    held.logp = (held.hidden @ states.weight.T).log_softmax(1)
    held.root = held.logp.div(2).exp()
    milestones = sorted({1, min(10, arguments.steps), arguments.steps})
    sample = slice(0, 2048)
    c = torch.where(torch.arange(2048) // RUN % 2 == 0, 1.0, -1.0)
    rows, exact = [], None
    words = arguments.only or [""]
    for name, gradient in kinds().items():
        if name != "exact" and not any(word in name for word in words):
            continue
        dh, dw = gradient(states.hidden[sample], states.weight, states.labels[sample], c, 0)
        found = learn(gradient, states, arguments.steps, arguments.tokens, arguments.lr, milestones)
        if exact is None:
            exact = SimpleNamespace(
                dh=dh, dw=dw, found=found, held={k: changes(x, states, held) for k, x in found.items()}
            )
            continue
        row = {"kind": name, "dh": relative(dh, exact.dh), "dw": relative(dw, exact.dw)}
        row["signs"] = float((dw.sign() == exact.dw.sign()).float().mean())
        for step, change in found.items():
            label, whole = changes(change, states, held)
            row[f"step {step}"] = {
                "weight": relative(change, exact.found[step]),
                "label": relative(label, exact.held[step][0]),
                "vocabulary": relative(whole, exact.held[step][1]),
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
    report = {
        "rows": rows,
        "steps": milestones,
        "tokens": arguments.tokens,
        "lr": arguments.lr,
        "states": everything.source,
    }
    report["made_by"] = made_by()
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
