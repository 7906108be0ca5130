"""A step asks the device for no number: it is walked on the meta device, whose tensors have none to give.

Looking at one (`bool`, `item`, `tolist`, `cpu`, `nonzero`, a mask as an index) is an error there by itself. A copy to
the device is none, and is refused here unless the host goes on meanwhile.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from replaced import replace_everywhere
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from tvkd_fast.data import MicroBatching, build_dataset
from tvkd_fast.models import PolicyWithHead, TeacherWithHead
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.ipo import IPO
from tvkd_fast.objectives.orpo import ORPO
from tvkd_fast.objectives.sft import SFT
from tvkd_fast.objectives.simpo import SimPO
from tvkd_fast.objectives.tvkd import TVKD
from tvkd_fast.objectives.wpo import WPO
from tvkd_fast.ops import known
from tvkd_fast.scoring.cache import ScoreCache
from tvkd_fast.scoring.layout import ScoreLayout, Scores
from tvkd_fast.scoring.scorer import CachedScorer, OnlineScorer
from tvkd_fast.training.optim import OptimConfig, make_optimizer, update
from tvkd_fast.training.step import train_step

META = torch.device("meta")
MAKERS = (torch.tensor, torch.as_tensor)


class WaitedError(AssertionError):
    pass


class NoWaitingCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        source = next((x for x in args if isinstance(x, torch.Tensor)), None)
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if copies and func.overloadpacket is torch.ops.aten.copy_:
            source = args[1]
        # A number of no dimension goes along with a launch.
        if copies and source.device.type == "cpu" and out.device == META and source.dim():
            given = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if not given:
                raise WaitedError(f"{func} of {tuple(source.shape)} to the device waits for it")
        return out


class NoListsToTheDevice(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in MAKERS and torch.device(kwargs.get("device") or "cpu") == META:
            raise WaitedError(f"{func.__name__} of a list waits for the device")
        return func(*args, **kwargs)


@pytest.fixture
def walked(monkeypatch):
    """The step's kernels count as run, and launched; a fused optimizer takes the meta device for a GPU."""
    from tvkd_fast.ops import triton_backend, triton_walk  # noqa: F401

    launched = []
    replace_everywhere(monkeypatch, launch=lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda _: None)
    return launched


@pytest.fixture
def dataset(files, chatml):
    return build_dataset(files / "train.jsonl", chatml, limit=5, max_length=40)


@pytest.mark.parametrize("packing", ["shared", "unshared", "padded"])
@pytest.mark.parametrize(
    "objective", [DPO(), TVKD(), IPO(), SimPO(), SFT(), ORPO(), WPO()], ids=lambda objective: objective.name
)
def test_a_step_waits_for_nothing(walked, tiny_model, dataset, objective, packing, monkeypatch):
    """Of shared prompts; where transformers makes the mask it looks once whether a row holds several sequences."""
    if packing != "shared":
        monkeypatch.setattr(masking_utils, "is_tracing", lambda _: True)
    policy, reference = (PolicyWithHead(tiny_model(seed), packing=packing) for seed in range(2))
    scorer = OnlineScorer(reference, TeacherWithHead(tiny_model(2), packing=packing))
    for model in (policy, reference, scorer.teacher):
        model.to(META)
    optimizer = make_optimizer(policy, OptimConfig())
    batching = MicroBatching(packing, pairs=2, tokens=100)
    batches = list(batching.batches(dataset, range(len(dataset)), chosen_only=isinstance(objective, SFT)))
    with NoListsToTheDevice(), NoWaitingCopies():
        out = train_step(
            policy,
            scorer,
            [batch.to(META) for batch in batches],
            optimizer,
            objective,
            clip_norm=1.0,
            skip_nonfinite=True,
        )
    assert out.finite.device == META
    assert {kernel.fn.__name__ for kernel in walked} >= {"block_exponentials_kernel"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(out.finite)


def test_a_cache_is_read_without_waiting(dataset):
    batch = next(iter(MicroBatching().batches(dataset, range(len(dataset)))))
    scores = Scores(torch.zeros(len(dataset), 2))
    cache = ScoreCache(SimpleNamespace(numbers=None), [scores], ScoreLayout.of(dataset))
    with NoListsToTheDevice(), NoWaitingCopies():
        scores = CachedScorer(cache).of(batch.to(META))
    assert scores.ref_logps.device == META


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x[0]),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.tensor([1.0], device=x.device),
    ],
)
def test_whatever_waits_is_refused(wait):
    with pytest.raises((RuntimeError, NotImplementedError, WaitedError)), NoListsToTheDevice(), NoWaitingCopies():
        wait(torch.zeros(3, device=META))


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_that_is_not_finite_changes_nothing(fused):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(7, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1, fused=fused)
    runs = []
    for broken in (False, True):
        for step in range(4):
            weight.grad = torch.full_like(weight, 0.5 + step)
            if broken and step == 2:
                before = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
                weight.grad.fill_(torch.nan)
                update(optimizer, torch.tensor(False))
                assert torch.equal(weight, before[0])
                assert all(torch.equal(v, before[1][k]) for k, v in optimizer.state[weight].items())
                weight.grad.fill_(0.5 + step)
            update(optimizer, torch.tensor(True))
        runs.append(weight.detach().clone())
        torch.manual_seed(0)
        weight.data.copy_(torch.randn(7, 3))
        optimizer.state.clear()
    assert torch.equal(*runs)
    assert not hasattr(optimizer, "found_inf")


def test_another_upstream_than_was_known_breaks_the_gradient_where_nobody_looks(monkeypatch):
    """On a CPU it is looked at, and computed anew."""
    monkeypatch.setattr(known, "waits", lambda _: False)
    hidden, weight = (torch.randn(n, 5).requires_grad_() for n in (6, 11))
    labels, cu = torch.arange(6), torch.tensor([0, 2, 6])
    upstream = known.Upstream(lambda logps, _: torch.ones_like(logps), cu, lengths=(2, 4))
    for factor, right in ((1.0, True), (2.0, False)):
        logps = known.known_logps(hidden, weight, labels, upstream)
        grads = torch.autograd.grad(factor * logps.sum(), (hidden, weight))
        assert all(bool(x.isfinite().all()) for x in grads) == right


@pytest.mark.parametrize("lengths", [(2, 3), (1, 2, 3), (6,)])
def test_lengths_on_the_host_are_the_boundaries(lengths):
    upstream = known.Upstream(lambda logps, _: logps, torch.tensor([0, 2, 6]), lengths=lengths)
    with pytest.raises(ValueError, match="lengths are of"):
        known.known_logps(torch.randn(6, 5, requires_grad=True), torch.randn(11, 5), torch.arange(6), upstream)
