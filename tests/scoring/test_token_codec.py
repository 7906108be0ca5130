"""Rows of tokens as files hold them: what comes back, in how many bytes, and how far off."""

import pytest
import torch

from tvkd_fast.ops import Head
from tvkd_fast.scoring.layout import Scores
from tvkd_fast.scoring.rotation import Rotation
from tvkd_fast.scoring.token_codec import codec_of


def through(codec, scores, *places):
    """What is read of single spans of rows, one behind the other."""
    opened = codec.opened(codec.packed(codec.encode(scores)))
    parts = [codec.rows(opened, start, end) for start, end in places]
    return codec.decode({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def states(rows=64, width=96, spiky=False):
    hidden = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    hidden[:, 5] += 30.0 if spiky else 0.0
    hidden[3] = 0.0
    return hidden


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_bfloat16_states_come_back_rounded():
    hidden = states()
    found = through(codec_of("states", "bfloat16", 0), Scores(teacher_hidden=hidden), (0, 64))["teacher_hidden"]
    assert torch.equal(found, hidden.bfloat16().float())


def test_int8_states_give_the_heads_logits_and_the_rotation_is_why():
    hidden, weight = states(spiky=True), torch.randn(200, 96, generator=torch.Generator().manual_seed(1))
    errors = []
    for rotation in (Rotation.seeded(96, 0), Rotation(torch.ones(96), [torch.eye(96)])):
        codec = codec_of("states", "int8", 0, rotation)
        rows = codec.encode(Scores(teacher_hidden=hidden))
        assert (rows["states"].dtype, rows["scales"].dtype) == (torch.int8, torch.float32)
        found = codec.decode(rows)["teacher_hidden"]
        assert not found[3].any()
        errors.append(error(found @ rotation.folded(Head(weight)).weight.T, hidden @ weight.T))
    assert errors[0] < 0.01
    assert errors[1] > 2 * errors[0]


def test_rows_are_found_by_their_places():
    codec = codec_of("states", "int8", 0, Rotation.seeded(96, 0))
    scores = Scores(teacher_hidden=states())
    whole = through(codec, scores, (0, 64))["teacher_hidden"]
    part = through(codec, scores, (0, 0), (40, 50), (7, 9))["teacher_hidden"]
    assert torch.equal(part, torch.cat([whole[40:50], whole[7:9]]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_states_that_are_not_finite_are_refused(bad):
    hidden = states()
    hidden[5, 7] = bad
    with pytest.raises(ValueError, match="states that are not finite"):
        codec_of("states", "int8", 0, Rotation.seeded(96, 0)).encode(Scores(teacher_hidden=hidden))


@pytest.mark.parametrize(("vocab_size", "ids_dtype"), [(60_000, torch.int16), (70_000, torch.int32)])
def test_top_k_come_back_with_the_mass_of_the_tail(vocab_size, ids_dtype):
    draw = torch.Generator().manual_seed(0)
    q = (3 * torch.randn(20, vocab_size, generator=draw)).log_softmax(1)
    logps, ids = q.topk(50)
    codec = codec_of("topk:50", None, vocab_size)
    scores = Scores(topk_ids=ids, topk_logps=logps)
    assert codec.encode(scores)["ids"].dtype == ids_dtype
    found = through(codec, scores, (0, 20))
    assert torch.equal(found["topk_ids"], ids)
    assert int(ids.max()) > 2**15
    torch.testing.assert_close(found["topk_logps"], logps, rtol=2**-10, atol=1e-3)
    torch.testing.assert_close(found["topk_logps"].exp().sum(1), logps.exp().sum(1), rtol=1e-6, atol=1e-6)


def test_a_top_k_of_everything_has_no_tail_and_an_impossible_token_no_probability():
    ids, logps = torch.tensor([[1, 0], [0, 1]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()
    found = through(codec_of("topk:2", None, 2), Scores(topk_ids=ids, topk_logps=logps), (0, 2))
    torch.testing.assert_close(found["topk_logps"].exp(), logps.exp())


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_samples_come_back_as_they_were(vocab_size):
    ids = torch.tensor([[3, 250, -1, -1], [7, -1, -1, -1], [1, 2, 5, 299]])
    shares = torch.tensor([[0.25, 0.75, 0, 0], [1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    codec, scores = codec_of("sampled:4", None, vocab_size), Scores(sampled_ids=ids, sampled_shares=shares)
    assert sum(len(x) for x in codec.packed(codec.encode(scores)).values()) == 7 + 7 + 3
    found = through(codec, scores, (2, 3), (0, 2))
    assert torch.equal(found["sampled_ids"], ids[[2, 0, 1]])
    assert torch.equal(found["sampled_shares"], shares[[2, 0, 1]])
    fewer = through(codec, scores, (0, 2))
    assert torch.equal(fewer["sampled_ids"], ids[:2, :2])
    assert through(codec, scores, (1, 1))["sampled_ids"].shape == (0, 0)


def test_the_places_of_draws_take_no_memory_a_token():
    """Spans that begin and end before, at and behind the places that are held."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 6, (1000,), generator=draw)
    drawn = torch.arange(5) < counts[:, None]
    ids = torch.randint(0, 300, (1000, 5), generator=draw).masked_fill(~drawn, -1)
    codec = codec_of("sampled:5", None, 300)
    packed = codec.packed(codec.encode(Scores(sampled_ids=ids, sampled_shares=drawn / counts[:, None])))
    opened = codec.opened(packed)
    held = sum(x.nbytes for name, x in opened.items() if name not in packed)
    assert held <= 1000 // 8
    for start, end in ((0, 1000), (255, 257), (256, 512), (300, 301), (511, 513), (999, 1000), (1000, 1000)):
        found = codec.decode(codec.rows(opened, start, end))["sampled_ids"]
        most = int(counts[start:end].max()) if end > start else 0
        assert torch.equal(found, ids[start:end, :most])
