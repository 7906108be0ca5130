"""The measured and counted bytes of a shared head's backward over many tokens. Argument: autocast."""

import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tvkd_fast.distributed import init_distributed
from tvkd_fast.distributed.vocabulary import Rows, SharedHead, states_held
from tvkd_fast.models.head import FusedLMHead, HeadTransforms

TOKENS, HIDDEN, VOCAB = 4096, 512, 32


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made under it and are still held, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if type(x) not in (torch.Tensor, nn.Parameter):
                continue
            storage = x.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = {"off": None, "bfloat16": torch.bfloat16}[sys.argv[1]]
    with init_distributed(torch.device("cpu"), timeout_s=120) as world:
        assert world.mesh is not None
        whole = FusedLMHead.from_linear(nn.Linear(HIDDEN, VOCAB, bias=False), HeadTransforms())
        rows = Rows(whole.weight, world.mesh)
        head = SharedHead.of(whole, nn.Parameter(rows.shard(whole.weight)), rows, dtype)
        hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
        labels = torch.randint(VOCAB, (TOKENS,))
        with Live() as live:
            head(hidden, labels).sum().backward()
        if world.first:
            counted = states_held(world.size, TOKENS, HIDDEN, 4 if dtype is None else dtype.itemsize)
            print(live.peak, counted, flush=True)


if __name__ == "__main__":
    main()
