"""Divergences of a head shared by processes beside those of the whole one in float64: values, dH and dW."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from tvkd_fast.distributed import World, init_distributed
from tvkd_fast.distributed.shared_divergence import shared_joint
from tvkd_fast.distributed.vocabulary import Rows, SharedHead
from tvkd_fast.models import FusedLMHead
from tvkd_fast.models.head import HeadTransforms
from tvkd_fast.ops import Head, HeadGradient, reference

HIDDEN, WIDE, VOCAB = 16, 24, 97
PLAIN, EXACT = HeadTransforms(), HeadGradient()
ALL = ("forward_kl", "reverse_kl", "entropy", "log_sum_p2", "alpha", "lse", "teacher_lse")
CASES: dict[str, dict[str, Any]] = {
    "forward": {"outputs": ("forward_kl",)},
    "all": {"outputs": ALL},
    "transforms": {"outputs": ALL, "transforms": HeadTransforms(5.0, 0.5), "bias": True},
    "teacher shared": {"outputs": ("reverse_kl", "forward_kl"), "share_teacher": True},
    "sparse": {
        "outputs": ("reverse_kl", "forward_kl"),
        "gradient": HeadGradient(grad_mode="sparse", eps=0.0, row_cap=VOCAB),
    },
    "rows": {"outputs": ("forward_kl", "alpha"), "every": 3},
}


def head_of(width: int, transforms: HeadTransforms, bias: bool, seed: int) -> FusedLMHead:
    torch.manual_seed(seed)
    head = FusedLMHead.from_linear(nn.Linear(width, VOCAB, bias=bias), transforms)
    head.weight.data.mul_(5.0)
    return head


def shared_of(whole: FusedLMHead, world: World) -> SharedHead:
    rows = Rows(whole.weight, world.mesh)
    return SharedHead.of(whole, nn.Parameter(rows.shard(whole.weight)), rows, None)


def whole_head(head: FusedLMHead) -> Head:
    return Head(head.weight, head.bias, head.transforms.softcap, head.transforms.logit_scale)


def errors(
    world: World,
    outputs: tuple[str, ...],
    transforms: HeadTransforms = PLAIN,
    gradient: HeadGradient = EXACT,
    bias: bool = False,
    share_teacher: bool = False,
    every: int = 1,
) -> dict[str, float]:
    # The last process has no token of its own.
    sizes = [5 + 3 * rank for rank in range(world.size - 1)] + [0]
    draw = torch.Generator().manual_seed(1)
    states, others = (torch.randn(sum(sizes), d, generator=draw) for d in (HIDDEN, WIDE))
    upstream = torch.randn(len(outputs), sum(sizes), generator=draw)
    start = sum(sizes[: world.rank])
    mine = slice(start, start + sizes[world.rank])
    whole, teacher = head_of(HIDDEN, transforms, bias, 0), head_of(WIDE, transforms, bias, 1)
    head = shared_of(whole, world)
    head.gradient = gradient
    hidden = states[mine].clone().requires_grad_()
    asked = torch.arange(sum(sizes)) % every == 0
    found = shared_joint(
        *(head, hidden, others[mine]),
        shared_of(teacher, world) if share_teacher else whole_head(teacher),
        outputs=outputs,
        alpha=0.3,
        temperature=1.4,
        rows=None if every == 1 else asked[mine],
    )
    values = torch.stack([found[name] for name in outputs])
    # Gradients are of the mean of the processes' losses.
    (values * upstream[:, mine] * world.size).sum().backward()
    h, w = (x.detach().double().requires_grad_() for x in (states, whole.weight))
    options = whole_head(whole), whole_head(teacher)
    z, u = (
        reference.logits(x, y, head.bias, head.softcap, head.logit_scale)
        for x, y, head in ((h, w, options[0]), (others, teacher.weight, options[1]))
    )
    want = reference.linear_joint(z, u, outputs=outputs, alpha=0.3, temperature=1.4)
    wanted = torch.stack([want[name] for name in outputs]) * asked
    (wanted * upstream).sum().backward()
    return {
        "values": float((values.double() - wanted[:, mine]).detach().abs().max()) if sizes[world.rank] else 0.0,
        "dH": relative(hidden.grad / world.size, h.grad[mine]),
        "dW": relative(head.weight.grad.full_tensor(), w.grad),
    }


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def main() -> None:
    torch.set_num_threads(1)
    with init_distributed(torch.device("cpu"), timeout_s=120) as world:
        for name, case in CASES.items():
            found = errors(world, **case)
            worst = torch.tensor(list(found.values()))
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
            if world.first:
                print(json.dumps({"case": name} | dict(zip(found, worst.tolist(), strict=True))), flush=True)


if __name__ == "__main__":
    main()
