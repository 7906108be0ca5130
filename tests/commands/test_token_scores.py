"""What `tvkd score --keep` keeps of response tokens: a cache says what the teacher says, or refuses."""

import json
import os
from dataclasses import replace

import pytest
import torch
from resumed import losses
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tvkd_fast.commands.caches import kept_per_token
from tvkd_fast.commands.score import ScoreConfig
from tvkd_fast.data import MicroBatching
from tvkd_fast.data.data_config import load_dataset
from tvkd_fast.files import sha256_of, unfinished
from tvkd_fast.models import PolicyWithHead, TeacherWithHead, load_model, load_tokenizer
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.objectives.divergences.forward_kl import ForwardKL
from tvkd_fast.objectives.divergences.jsd import JSD
from tvkd_fast.objectives.divergences.sparse_kl import SparseKL
from tvkd_fast.objectives.states.relational import Relational
from tvkd_fast.scoring.cache import ScoreCache, describe
from tvkd_fast.scoring.layout import TOKEN_NAMES
from tvkd_fast.scoring.manifest import MANIFEST, Part, read_manifest
from tvkd_fast.scoring.scorer import CachedScorer, OnlineScorer, RewardTeacher
from tvkd_fast.scoring.token_files import HEAD

KINDS = ("states", "topk:8", "sampled:20")


@pytest.fixture
def pairs(make_config):
    config = make_config()
    return load_dataset("train", config.data, load_tokenizer(config.policy))


@pytest.fixture
def online(make_config):
    """The teacher's own answers for a batch."""

    def of(*kinds, reward=None):
        model = load_model(make_config().teacher)
        teacher = TeacherWithHead(model) if reward is None else RewardTeacher(PolicyWithHead(model), reward)
        return OnlineScorer(None, teacher, of_teacher=kinds)

    return of


def batches(pairs, **options):
    return MicroBatching("padded", pairs=5, tokens=0).batches(pairs, [3, 20, 8, 7, 0, 13, 6], **options)


def logits(scores):
    return scores.teacher_hidden @ scores.teacher_head.weight.T


@pytest.mark.parametrize(("dtype", "off"), [("int8", 0.02), ("bfloat16", 0.005)])
def test_cached_states_have_the_teachers_logits(dtype, off, scored, pairs, online):
    cache = scored(keep=["states"], states_dtype=dtype)
    assert (cache.manifest.states_dtype, cache.manifest.rotation) == (dtype, 0 if dtype == "int8" else None)
    for chosen_only in (False, True):
        for batch in batches(pairs, chosen_only=chosen_only):
            found, wanted = (logits(scorer.of(batch)) for scorer in (CachedScorer(cache), online("states")))
            assert found.shape == (len(batch.labels), wanted.shape[1])
            assert float((found - wanted).norm()) < off * float(wanted.norm())
    empty = cache.of(torch.tensor([], dtype=torch.int64))
    assert empty.teacher_hidden.shape == (0, cache.tokens.head.weight.shape[1])


def test_a_run_reads_nothing_of_tokens_that_its_objective_does_not_need(scored, pairs, make_config):
    cache, batch = scored(keep=["values", *KINDS]), next(iter(batches(pairs)))
    of_states = CachedScorer(cache, kept_per_token(ForwardKL().needs)).of(batch)
    assert of_states.teacher_hidden is not None
    assert of_states.topk_ids is of_states.sampled_ids is None
    of_values = CachedScorer(cache, kept_per_token(make_config().loss.needs)).of(batch)
    assert of_values.lse is not None
    assert [of_values.teacher_hidden, of_values.teacher_head, of_values.topk_ids] == [None] * 3


def test_a_cached_head_is_rotated_with_its_states(scored, pairs, online):
    head, batch = scored(keep=["states"]).tokens.head, next(iter(batches(pairs)))
    plain = online("states").of(batch).teacher_head
    assert not torch.allclose(head.weight, plain.weight, atol=0.1 * float(plain.weight.std()))
    torch.testing.assert_close(head.weight @ head.weight.T, plain.weight @ plain.weight.T, rtol=1e-4, atol=1e-6)


def test_cached_top_k_and_samples_are_the_online_ones(scored, pairs, online):
    cache = scored(keep=list(KINDS))
    assert cache.numbers == ("ref_logps", *KINDS)
    for batch in batches(pairs):
        found, wanted = CachedScorer(cache).of(batch), online(*KINDS).of(batch)
        assert torch.equal(found.topk_ids, wanted.topk_ids)
        torch.testing.assert_close(found.topk_logps, wanted.topk_logps, rtol=2**-10, atol=1e-4)
        most = found.sampled_ids.shape[1]
        assert torch.equal(found.sampled_ids, wanted.sampled_ids[:, :most])
        assert torch.equal(found.sampled_shares, wanted.sampled_shares[:, :most])
        assert not wanted.sampled_shares[:, most:].any()


RUNS = [
    (ForwardKL(responses="both"), "states", 1e-2),
    (JSD(mixing=0.5), "states", 1e-2),
    (Relational(), "states", 1e-2),
    (SparseKL(), "topk:50", 1e-3),
    (SparseKL(kept="sampled", responses="both"), "sampled:50", 1e-5),
]


@pytest.mark.parametrize(("loss", "kind", "off"), RUNS, ids=lambda x: getattr(x, "name", ""))
def test_a_run_on_what_is_kept_is_the_online_run(loss, kind, off, scored, make_config, run, files):
    online = replace(make_config(objective=loss.name, output_dir=str(files / "online")), loss=loss)
    cached = replace(online, teacher=None, scores=str(files / "scores"), output_dir=str(files / "cached"))
    cached = replace(cached, data=replace(cached.data, eval=None))
    scored()
    with pytest.raises(ValueError, match=r"add them with `tvkd score .*--teacher MODEL --keep \[" + kind + r"\]`"):
        run(cached)
    scored(keep=[kind])
    run(online)
    run(cached)
    found, wanted = losses(cached), losses(online)
    assert len(wanted) == 6
    assert found == pytest.approx(wanted, rel=off)
    assert wanted[0] != pytest.approx(wanted[-1], rel=2e-2)


def test_the_teacher_of_rewards_has_states_too(scored, pairs, online, model_folder):
    own = model_folder(seed=4)
    cache = scored(keep=["values", "states"], teacher_reference=own, states_dtype="bfloat16")
    assert cache.numbers == ("ref_logps", "reward", "states")
    batch = next(iter(batches(pairs)))
    wanted = logits(online("states", "values", reward=PolicyWithHead(load_model(own))).of(batch))
    torch.testing.assert_close(logits(cache.of(batch.pairs)), wanted, rtol=0.02, atol=0.02 * float(wanted.std()))


def test_kinds_are_added_and_files_that_are_there_are_left(scored, computed, files):
    first = scored(keep=["states"])
    inode = os.stat(files / "scores" / "states-00001.safetensors").st_ino
    computed.clear()
    cache = scored(keep=["values", "states", "topk:8"], pairs_per_shard=9)
    assert set().union(*computed) == {"lse", "lse_kappa", "topk_ids", "topk_logps"}
    assert cache.numbers == ("ref_logps", "lse", "lse_kappa", "states", "topk:8")
    assert [shard.pairs for shard in cache.manifest.shards] == [7, 7, 7, 3]
    assert os.stat(files / "scores" / "states-00001.safetensors").st_ino == inode
    everything = torch.arange(24)
    assert torch.equal(cache.of(everything).teacher_hidden, first.of(everything).teacher_hidden)
    computed.clear()
    scored(keep=["topk:8"])
    assert computed == []


def test_states_are_added_to_values(scored, computed):
    values = scored()
    computed.clear()
    cache = scored(keep=["states"])
    assert set().union(*computed) == {"teacher_hidden", "teacher_head"}
    assert torch.equal(cache.of(torch.arange(24)).lse, values.of(torch.arange(24)).lse)


def test_a_killed_pass_goes_on_with_its_head(scored, computed, killed_at, files):
    killed_at(14, lambda: scored(keep=list(KINDS)))
    head = unfinished(files / "scores") / HEAD
    inode = head.stat().st_ino
    torn = unfinished(files / "scores") / "topk8-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    computed.clear()
    cache = scored(keep=list(KINDS))
    assert len(computed) == 3
    assert (files / "scores" / HEAD).stat().st_ino == inode
    whole = scored(keep=list(KINDS), output_dir=str(files / "whole")).of(torch.arange(24))
    for name in TOKEN_NAMES:
        torch.testing.assert_close(getattr(cache.of(torch.arange(24)), name), getattr(whole, name))


def test_a_folder_says_its_bytes_a_token(scored, files):
    cache = scored(keep=["values", *KINDS])
    text = describe(files / "scores")
    tokens = cache.layout.num_states - 48
    width = cache.tokens.head.weight.shape[1]
    sizes = dict(pair.split(" ") for pair in text.split("bytes a token")[1].split("\n")[0].strip().split(", "))
    assert width + 4 < float(sizes["states"]) < width + 4 + 4 * 400 / tokens + 1
    assert float(sizes["lse"]) == pytest.approx(4 * cache.layout.num_states / tokens, abs=0.06)
    assert set(sizes) == {"ref_logps", "lse", *KINDS}
    assert "states            in int8, after a rotation that their head has as well; the head has" in text


def resigned(folder, **changes):
    """Write the manifest anew, as if these had been its contents."""
    (folder / MANIFEST).write_text(replace(read_manifest(folder), **changes).text())


def test_states_of_another_head_are_refused(scored, pairs, files, model_folder):
    scored(keep=["states"])
    folder = files / "scores"
    manifest = read_manifest(folder)
    tensors = load_file(folder / HEAD)
    with safe_open(folder / HEAD, "pt") as file:
        metadata = file.metadata()
    save_file({name: 2.0 * x for name, x in tensors.items()}, folder / HEAD, metadata)
    with pytest.raises(ValueError, match=rf"{HEAD} does not match its checksum"):
        ScoreCache.load(folder, pairs)
    resigned(folder, head=Part(HEAD, sha256_of(folder / HEAD)))
    with pytest.raises(ValueError, match=rf"states-00000.safetensors holds states of another head than .*{HEAD}"):
        ScoreCache.load(folder, pairs)
    resigned(folder, head=None)
    with pytest.raises(ValueError, match="names states and no head of theirs"):
        ScoreCache.load(folder, pairs)
    assert manifest.head is not None


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_missing_or_misshapen_rows_are_refused_by_the_file(kind, scored, pairs, files):
    scored(keep=[kind])
    folder, name = files / "scores", f"{kind.replace(':', '')}-00002.safetensors"
    whole, manifest = (folder / name).read_bytes(), read_manifest(folder)
    (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{name} does not match its checksum: it is damaged; run `tvkd score` again"):
        ScoreCache.load(folder, pairs)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        ScoreCache.load(folder, pairs)
    (folder / name).write_bytes((folder / name.replace("2.", "3.")).read_bytes())
    shards = list(manifest.shards)
    shards[2] = replace(shards[2], beside=(Part(name, sha256_of(folder / name)),))
    resigned(folder, shards=tuple(shards))
    with pytest.raises(ValueError, match=rf"{name} does not match the manifest: run `tvkd score` again"):
        ScoreCache.load(folder, pairs)
    shards[2] = replace(shards[2], beside=())
    resigned(folder, shards=tuple(shards))
    with pytest.raises(ValueError, match=rf"{name} is not in the manifest"):
        ScoreCache.load(folder, pairs)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (
            {"keep": ["topk:8"]},
            {"keep": ["topk:4"]},
            r"holds topk:8 of the same data under other settings \(topk:4 wanted\)",
        ),
        (
            {"keep": ["states"]},
            {"keep": ["states"], "states_dtype": "bfloat16"},
            r"holds states of the same data .* \(states_dtype int8, not bfloat16\), .* give another --output_dir",
        ),
        ({"keep": ["values", "states"]}, {"kappa": 0.5}, r"\(kappa 1.0, not 0.5\)"),
        ({"keep": ["values", "topk:8"]}, {"value_dtype": "float16"}, r"\(value_dtype float32, not float16\)"),
        ({"keep": ["sampled:8"]}, {"model": ModelConfig(dtype="bfloat16")}, r"\(precision float32.*, not bfloat16.*\)"),
    ],
)
def test_what_took_a_pass_is_not_replaced(first, then, message, scored, files):
    scored(**first)
    before = (files / "scores" / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match=message):
        scored(**then)
    assert (files / "scores" / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("teacher", [{}, {"teacher": None}])
def test_nor_is_it_for_another_reference(teacher, scored, model_folder):
    scored(keep=["states"])
    with pytest.raises(ValueError, match=r"holds states of the same data .* \(reference \w{12}…, not \w{12}…\)"):
        scored(reference=model_folder(seed=7), **teacher)


@pytest.mark.parametrize("file", ["states-00001.safetensors", "scores-00001.safetensors", HEAD, MANIFEST])
def test_nor_for_a_bit_that_is_damaged(file, scored, files):
    scored(keep=["states"])
    damaged = files / "scores" / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(ValueError, match=rf"{file} .*damaged.* give another --output_dir, or delete .* to score anew"):
        scored(keep=["topk:8"])
    assert (files / "scores" / "states-00000.safetensors").exists()


def test_a_killed_run_that_cannot_be_read_is_not_thrown_away(scored, killed_at, files):
    killed_at(14, lambda: scored(keep=["states"]))
    manifest = unfinished(files / "scores") / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 5', '"format": 6'))
    with pytest.raises(ValueError, match=r"is of format 6, .* delete .*\.scores\.partial to score anew"):
        scored(keep=["states"])
    assert (manifest.parent / "states-00001.safetensors").exists()


def test_another_teachers_states_are_made_anew(scored, model_folder, computed):
    scored(keep=["states", "logps"])
    computed.clear()
    assert scored(keep=["states"], teacher=model_folder(seed=7)).numbers == ("ref_logps", "states")
    assert set().union(*computed) == {"ref_logps", "teacher_hidden", "teacher_head"}


def test_a_teacher_of_other_tokens_is_refused(scored, model_folder, train_tokenizer):
    merged = train_tokenizer(["say red green blue sun moon sea tree bread stone"] * 9)
    with pytest.raises(ValueError, match=r"states and topk:8 of this teacher would be of other tokens than the policy"):
        scored(teacher=model_folder(seed=1, tokenizer=merged, vocab_size=404), keep=["topk:8", "states"])


def test_tokens_rows_are_a_teachers():
    with pytest.raises(ValueError, match="--keep states sampled:3 is of a teacher: set --teacher"):
        ScoreConfig(output_dir="x", policy="y", keep=["sampled:3", "states"])


def test_a_manifest_of_tokens_is_json(scored, files):
    scored(keep=["states"])
    body = json.loads((files / "scores" / MANIFEST).read_text())
    assert (body["format"], body["states_dtype"], body["rotation"], body["head"]["file"]) == (5, "int8", 0, HEAD)
    assert [part["file"] for shard in body["shards"] for part in shard["beside"]] == [
        f"states-{i:05d}.safetensors" for i in range(4)
    ]
