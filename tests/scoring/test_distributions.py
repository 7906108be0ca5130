"""What is kept of a teacher's distributions, against whole softmaxes in float64."""

import pytest
import torch

from tvkd_fast.data import collate_pairs
from tvkd_fast.data.tokenization import TokenizedPair
from tvkd_fast.ops import Head, reference
from tvkd_fast.scoring import distributions
from tvkd_fast.scoring.distributions import kept_of, systematic_samples, token_uniforms
from tvkd_fast.scoring.kinds import check_kinds, token_kinds


@pytest.fixture
def batch():
    return collate_pairs(
        [
            TokenizedPair([1, 2], [3, 4, 9], [5, 9], True, True, "row 0"),
            TokenizedPair([1], [6, 9], [7, 7, 7, 9], True, True, "row 1"),
        ],
        [0, 1],
    )


@pytest.fixture
def head():
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(97, 12, generator=draw), torch.randn(97, generator=draw)
    return Head(weight, bias, softcap=20.0, logit_scale=1.5)


def drawn(rows, width=12, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def log_q(hidden, head):
    whole = reference.logits(hidden.double(), head.weight.double(), head.bias.double(), head.softcap, head.logit_scale)
    return whole.log_softmax(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_are_the_softmaxs(dtype, batch, head, monkeypatch):
    monkeypatch.setattr(distributions, "_ENTRIES", 4 * 97)
    monkeypatch.setattr(distributions, "_COLUMNS", 40)
    head = Head(head.weight.to(dtype), head.bias.to(dtype), head.softcap, head.logit_scale)
    hidden = drawn(len(batch.labels), dtype=dtype)
    found = kept_of(("topk:5",), batch, hidden, head)
    want, ids = log_q(hidden, head).topk(5)
    assert torch.equal(found["topk_ids"], ids)
    assert found["topk_logps"].dtype == torch.float32
    torch.testing.assert_close(found["topk_logps"].double(), want, rtol=1e-5, atol=1e-5)


def test_samples_are_right_in_expectation_and_drawn_nearly_in_proportion():
    q = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01], [0.01, 0.01, 0.01, 0.01, 0.96]], dtype=torch.float64)
    mean, k = torch.zeros_like(q), 10
    for offset in (torch.arange(2000) + 0.5) / 2000:
        ids, shares = systematic_samples(q.log().float(), offset.expand(2).double(), k)
        assert torch.equal(shares > 0, ids >= 0)
        drawn_shares = torch.zeros_like(q).scatter_add_(1, ids.clamp_min(0), shares.double())
        torch.testing.assert_close(drawn_shares.sum(1), torch.ones(2, dtype=torch.float64))
        assert bool(((drawn_shares - q).abs() < 1 / k + 1e-6).all())
        mean += drawn_shares / 2000
    torch.testing.assert_close(mean, q, rtol=0, atol=1e-3 / k)


def test_samples_are_a_function_of_pair_response_and_place(batch, head):
    uniforms = token_uniforms(batch)
    assert len(set(uniforms.tolist())) == len(batch.labels)
    assert bool(((uniforms > 0) & (uniforms < 1)).all())
    alone = collate_pairs([TokenizedPair([1], [6, 9], [7, 7, 7, 9], True, True, "row 1")], [1])
    places = torch.tensor([3, 4, 7, 8, 9, 10])
    assert torch.equal(token_uniforms(alone), uniforms[places])
    hidden = drawn(len(batch.labels))
    whole, part = (
        kept_of(("sampled:20",), one, rows, head) for one, rows in ((batch, hidden), (alone, hidden[places]))
    )
    assert torch.equal(part["sampled_ids"], whole["sampled_ids"][places])
    many = torch.cat([token_uniforms(batch, seed) for seed in range(500)])
    assert abs(float(many.mean()) - 0.5) < 4 / (12 * len(many)) ** 0.5


def test_more_than_the_vocabulary_is_refused(batch, head):
    with pytest.raises(ValueError, match="topk:98 is more than the teacher's vocabulary of 97"):
        kept_of(("topk:98",), batch, drawn(len(batch.labels)), head)


@pytest.mark.parametrize(
    "names", [["top50"], ["topk"], ["topk:0"], ["topk:-3"], ["sampled:256"], ["states:8"], ["values:1"], ["logps", ""]]
)
def test_what_is_no_kind_is_refused(names):
    with pytest.raises(ValueError, match=f"keep names '{names[-1]}', which is none of values, logps, states"):
        check_kinds(names)


def test_one_of_a_kind():
    with pytest.raises(ValueError, match="keep names topk:5 and topk:6: a folder holds one of a kind"):
        check_kinds(["topk:5", "values", "topk:6"])
    assert token_kinds(["sampled:3", "values", "states", "topk:5"]) == ("states", "topk:5", "sampled:3")
