"""A teacher's distributions from a cache: bytes a token, and how far they are from the teacher's own.

    python -m bench.divergence.caches --json FILE

What `tvkd score --keep` writes is coded and decoded again, of the packaged model's states over preference data as the
teacher's; p is of the same model pruned to `--layers` layers, or of a `--student`. Errors are of p − q, which is
forward KL's gradient by the student's logits: ‖q̂ − q‖ over ‖p − q‖ in Frobenius' norm, in float64 sums.

Letters: N tokens, R rows of a block, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.divergence.comparison import prepared_pair
from bench.harness.machine import made_by, write_report
from bench.harness.states import load_states
from bench.head.comparison import prepared_states
from tvkd_fast.ops import Head
from tvkd_fast.scoring.distributions import systematic_samples
from tvkd_fast.scoring.layout import Scores
from tvkd_fast.scoring.rotation import Rotation
from tvkd_fast.scoring.token_codec import Codec, codec_of

BLOCK = 128
PASSES = 32
"""Of samples, the passes over whose mean an unbiased error falls, by their root."""


@dataclass
class Block:
    """Rows of the teacher's: its states, and log q [R, V] in float32."""

    hidden: Tensor
    log_q: Tensor


Cached = Callable[[Block, int], tuple[Tensor, float]]
"""A block and the number of a pass, to q̂ [R, V] and the bytes of its rows."""


def through(codec: Codec, scores: Scores) -> tuple[dict[str, Tensor], float]:
    """What comes back from a file, and its bytes."""
    packed = codec.packed(codec.encode(scores))
    rows = codec.rows(codec.opened(packed), 0, len(next(iter(codec.encode(scores).values()))))
    return codec.decode(rows), sum(x.nbytes for x in packed.values())


def states(codec: Codec, head: Head, block: Block, _: int) -> tuple[Tensor, float]:
    found, size = through(codec, Scores(teacher_hidden=block.hidden))
    return (found["teacher_hidden"] @ head.weight.T).softmax(1), size


def top_k(k: int, block: Block, _: int, *, even: bool) -> tuple[Tensor, float]:
    logps, ids = block.log_q.topk(k)
    found, size = through(codec_of(f"topk:{k}", None, block.log_q.shape[1]), Scores(topk_ids=ids, topk_logps=logps))
    q = found["topk_logps"].exp()
    left = 1.0 - q.sum(1, keepdim=True)
    others = left / (block.log_q.shape[1] - k) if even else torch.zeros_like(left)
    q = q if even else q / (1.0 - left)
    return others.expand_as(block.log_q).scatter(1, found["topk_ids"], q), size


def sampled(k: int, block: Block, seed: int, *, systematic: bool) -> tuple[Tensor, float]:
    draw = torch.Generator().manual_seed(seed)
    if systematic:
        offsets = torch.rand(len(block.log_q), generator=draw, dtype=torch.float64)
        ids, shares = systematic_samples(block.log_q, offsets, k)
    else:
        drawn = torch.multinomial(block.log_q.exp(), k, replacement=True, generator=draw)
        counts = torch.zeros_like(block.log_q).scatter_add_(1, drawn, torch.ones(drawn.shape))
        counts, ids = counts.topk(k)
        ids, shares = ids.masked_fill(counts == 0, -1), counts / k
    found, size = through(
        codec_of(f"sampled:{k}", None, block.log_q.shape[1]), Scores(sampled_ids=ids, sampled_shares=shares)
    )
    ids, shares = found["sampled_ids"], found["sampled_shares"]
    return torch.zeros_like(block.log_q).scatter_add_(1, ids.clamp_min(0), shares), size


def caches(head: Head) -> dict[str, Cached]:
    width = head.weight.shape[1]
    rotation, plain = Rotation.seeded(width, 0), Rotation(torch.ones(width), [torch.eye(width)])
    return {
        "states, bfloat16": partial(states, codec_of("states", "bfloat16", 0), head),
        "states, int8, rotated": partial(states, codec_of("states", "int8", 0, rotation), rotation.folded(head)),
        "states, int8, not rotated": partial(states, codec_of("states", "int8", 0, plain), head),
        "topk:50, tail spread evenly": partial(top_k, 50, even=True),
        "topk:50, renormalised": partial(top_k, 50, even=False),
        "sampled:50": partial(sampled, 50, systematic=True),
        "sampled:50, independent draws": partial(sampled, 50, systematic=False),
    }


def measure(hidden: Tensor, head: Head, student: Tensor, weight: Tensor, passes: int = PASSES) -> list[dict[str, Any]]:
    """A row a cache: bytes a token, the error of p − q, and of its mean over passes where passes differ."""
    norm, n = 0.0, len(hidden)
    found = {name: {"bytes": 0.0, "error": 0.0, "mean_error": 0.0} for name in caches(head)}
    for rows in torch.arange(n).split(BLOCK):
        block = Block(hidden[rows], (hidden[rows] @ head.weight.T).log_softmax(1))
        q = block.log_q.exp()
        norm += _squares((student[rows] @ weight.T).softmax(1) - q)
        for name, cache in caches(head).items():
            differing = passes if name.startswith("sampled") else 1
            mean = torch.zeros_like(q)
            for seed in range(differing):
                got, size = cache(block, seed)
                found[name]["error"] += _squares(got - q) / differing
                found[name]["bytes"] += size / differing
                mean += (got - q) / differing
            found[name]["mean_error"] += _squares(mean)
    return [
        {
            "name": name,
            "bytes": x["bytes"] / n,
            "error": (x["error"] / norm) ** 0.5,
            "mean_error": (x["mean_error"] / norm) ** 0.5,
        }
        for name, x in found.items()
    ]


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--data", default="bundled:train", help="pairs to take states from")
    parser.add_argument("--layers", type=int, default=24, help="of the teacher's layers, those that the student keeps")
    parser.add_argument("--student", help="a folder with another student, of the packaged model's shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.tokens, 576, 49152)
    files = prepared_pair(shape, model="smollm2-135m", data=arguments.data, layers=arguments.layers)
    if arguments.student is not None:
        files = prepared_states(shape, model=arguments.student, data=arguments.data), files[1]
    student, teacher = map(load_states, files)
    rows = measure(teacher.hidden, Head(teacher.weight), student.hidden, student.weight)
    report = {
        "tokens": len(teacher.hidden),
        "student": student.source,
        "teacher": teacher.source,
        "passes": PASSES,
        "caches": rows,
        "made_by": made_by(arguments.threads),
    }
    for row in rows:
        print(f"{row['name']:<32} {row['bytes']:8.1f} bytes  {row['error']:6.2%}  mean {row['mean_error']:6.2%}")
    write_report(report, arguments.json)


if __name__ == "__main__":
    main()
