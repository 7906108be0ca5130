"""A head shared by processes beside the whole one, both in bfloat16, against float64: rows of dW, and dH."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from tvkd_fast.distributed import World, init_distributed
from tvkd_fast.distributed.vocabulary import Rows, SharedHead
from tvkd_fast.models import FusedLMHead
from tvkd_fast.models.head import HeadTransforms
from tvkd_fast.ops import HeadGradient
from tvkd_fast.ops.reference import linear_logps as twin

TOKENS, HIDDEN, VOCAB = 512, 32, 96
PLAIN, EXACT = HeadTransforms(), HeadGradient()
CASES: dict[str, dict[str, Any]] = {
    "exact": {},
    "softcap": {"transforms": HeadTransforms(softcap=5.0)},
    "scaled, bias": {"transforms": HeadTransforms(logit_scale=0.25), "bias": True},
    "sparse": {"gradient": HeadGradient(grad_mode="sparse", eps=0.0)},
    "frozen": {"frozen": True},
}


def head_of(transforms: HeadTransforms, gradient: HeadGradient, bias: bool) -> FusedLMHead:
    torch.manual_seed(0)
    head = FusedLMHead.from_linear(nn.Linear(HIDDEN, VOCAB, bias=bias), transforms)
    head.weight.data.mul_(4.0).copy_(head.weight.bfloat16())
    head.gradient = gradient
    return head


def errors(
    world: World,
    transforms: HeadTransforms = PLAIN,
    gradient: HeadGradient = EXACT,
    bias: bool = False,
    frozen: bool = False,
) -> dict[str, float]:
    assert world.mesh is not None
    draw = torch.Generator().manual_seed(1)
    all_states = torch.randn(world.size * TOKENS, HIDDEN, generator=draw).bfloat16().float()
    # Nearly all of them lie in the last process's rows, so that all others have the states of strangers.
    labels = torch.randint(VOCAB - 8, VOCAB, (world.size * TOKENS,), generator=draw)
    upstream = torch.rand(world.size * TOKENS, generator=draw)
    mine = slice(world.rank * TOKENS, (world.rank + 1) * TOKENS)
    whole = head_of(transforms, gradient, bias)
    rows = Rows(whole.weight, world.mesh)
    shared = SharedHead.of(whole, nn.Parameter(rows.shard(whole.weight)), rows, torch.bfloat16)
    shared.gradient = gradient
    shared.weight.requires_grad_(not frozen)
    hidden = all_states[mine].clone().requires_grad_()
    logps = shared(hidden, labels[mine])
    # Gradients are of the mean of the processes' losses.
    (logps * upstream[mine] * world.size).sum().backward()
    ours = [logps.detach(), hidden.grad / world.size]
    plain = whole.bfloat16()
    plain.weight.requires_grad_(not frozen)
    states = all_states.bfloat16().requires_grad_()
    (plain(states, labels) * upstream).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (all_states, plain.weight)]
    options = {"softcap": transforms.softcap, "logit_scale": transforms.logit_scale}
    options["bias"] = None if plain.bias is None else plain.bias.detach().double()  # type: ignore[assignment]
    reference = twin(*exact, labels, **options)
    (reference * upstream).sum().backward()
    found = {"logps": float((ours[0] - reference[mine]).abs().max())}
    found |= _error("dH", ours[1], states.grad[mine], exact[0].grad[mine])
    if not frozen:
        found |= _error("dW", shared.weight.grad.full_tensor(), plain.weight.grad, exact[1].grad)
    return found


def _error(name: str, ours: Tensor, plain: Tensor, reference: Tensor) -> dict[str, float]:
    """Return the error of the worst row, relative to it."""
    wrong = [((x.double() - reference).norm(dim=1) / reference.norm(dim=1)).max() for x in (ours, plain)]
    return {name: float(wrong[0]), f"{name} whole": float(wrong[1])}


def main() -> None:
    torch.set_num_threads(1)
    with init_distributed(torch.device("cpu"), timeout_s=120) as world:
        for name, case in CASES.items():
            found = errors(world, **case)
            if world.first:
                print(json.dumps({"case": name} | found), flush=True)


if __name__ == "__main__":
    main()
