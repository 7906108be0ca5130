import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from tvkd_fast.data import PairDataset, TokenReport, collate_pairs
from tvkd_fast.data.tokenization import TokenizedPair
from tvkd_fast.files import unfinished
from tvkd_fast.scoring.cache import ScoreCache, ScoreWriter, describe
from tvkd_fast.scoring.layout import ScoreLayout, Scores
from tvkd_fast.scoring.manifest import MANIFEST, ScoreManifest, read_manifest
from tvkd_fast.scoring.score_pairs import first_difference

SHARD = "scores-00000.safetensors"


@pytest.fixture
def dataset():
    return [
        TokenizedPair([1, 2], [3, 4, 9], [5, 9], True, True, "row 0"),
        TokenizedPair([1], [6, 9], [7, 7, 7, 9], True, True, "row 1"),
        TokenizedPair([1, 2, 3], [8, 9], [4, 9], True, True, "row 2"),
    ]


@pytest.fixture
def make_manifest(dataset):
    def make(**changes):
        layout = ScoreLayout.of(dataset)
        manifest = {
            "dataset": "d" * 64,
            "tokenizer": "t" * 64,
            "teacher": "e" * 64,
            "reference": "r" * 64,
            "precision": "float32",
            "kappa": 0.7,
            "pairs": layout.num_pairs,
            "states": layout.num_states,
            "versions": {"torch": "2"},
        }
        return ScoreManifest(**(manifest | changes))

    return make


def numbers(dataset, kappa=0.7, first=0, last=None):
    """Return the numbers of the pairs first..last−1: counts, so that a number shows its state's place."""
    layout, last = ScoreLayout.of(dataset), len(dataset) if last is None else last
    lse = torch.arange(float(layout.num_states))[layout.bounds[2 * first] : layout.bounds[2 * last]]
    ref_logps = torch.arange(2.0 * len(dataset)).view(-1, 2)[first:last]
    return Scores(ref_logps, lse, lse if kappa == 1.0 else -lse)


@pytest.fixture
def write(dataset, make_manifest):
    """Write a finished cache with so many pairs per shard."""

    def write(folder, shard=2, **changes):
        manifest = make_manifest(**changes)
        writer = ScoreWriter(folder, manifest, ScoreLayout.of(dataset))
        while writer.pairs < len(dataset):
            last = min(writer.pairs + shard, len(dataset))
            writer.write(numbers(dataset, manifest.kappa, writer.pairs, last))
        writer.finish()
        return folder

    return write


@pytest.mark.parametrize("shard", [1, 2, 3])
@pytest.mark.parametrize("kappa", [1.0, 0.7])
def test_scores_come_back_as_they_were(kappa, shard, write, make_manifest, dataset, tmp_path):
    cache = ScoreCache.load(write(tmp_path / "scores", shard, kappa=kappa), dataset)
    assert cache.manifest.same_numbers(make_manifest(kappa=kappa))
    assert len(cache.pieces) == -(-3 // shard)
    whole = ScoreCache(cache.manifest, [numbers(dataset, kappa)], ScoreLayout.of(dataset))
    for pairs in ([0, 1, 2], [2, 0], [1]):
        want = whole.of(torch.tensor(pairs))
        for name, got in vars(cache.of(torch.tensor(pairs))).items():
            wanted = getattr(want, name)
            assert got is wanted is None or torch.equal(got, wanted)
    size = sum(path.stat().st_size for path in (tmp_path / "scores").glob("*.safetensors"))
    states = cache.layout.num_states
    assert size <= states * (4 if kappa == 1.0 else 8) + 6 * 4 + 512 * len(cache.pieces)


def test_a_batch_gets_the_numbers_of_its_own_states(write, dataset, tmp_path):
    cache = ScoreCache.load(write(tmp_path / "scores"), dataset)
    batch = collate_pairs([dataset[2], dataset[0]], [2, 0])
    scores = cache.of(batch.pairs)
    assert scores.ref_logps.tolist() == [4, 0, 5, 1]
    bounds = cache.layout.bounds.tolist()
    expected = [bounds[4], bounds[0], bounds[5], bounds[1]]
    assert scores.lse[batch.cu_states[:-1]].tolist() == expected
    assert scores.lse.numel() == batch.states.numel()
    assert torch.equal(scores.lse_kappa, -scores.lse)


def test_an_empty_batch_gets_none_of_each_kind(write, dataset, tmp_path):
    scores = ScoreCache.load(write(tmp_path / "scores"), dataset).of(torch.tensor([], dtype=torch.int64))
    assert (scores.ref_logps.shape, scores.lse.shape, scores.lse_kappa.shape) == ((0,), (0,), (0,))
    assert scores.reward is None


def test_float16_takes_half_and_comes_back_in_float32(write, dataset, tmp_path):
    cache = ScoreCache.load(write(tmp_path / "scores", value_dtype="float16"), dataset)
    assert cache.pieces[0].lse.dtype == torch.float16
    assert cache.pieces[0].ref_logps.dtype == torch.float32
    assert cache.of(torch.tensor([1])).lse.dtype == torch.float32


def test_shards_are_mapped_and_not_copied(write, dataset, tmp_path):
    cache = ScoreCache.load(write(tmp_path / "scores"), dataset)
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / "scores" / SHARD) in maps.read()
    assert cache.pieces[0].lse is not None
    assert cache.pieces[0].reward is None


def test_a_killed_pass_goes_on_after_its_whole_shards(dataset, make_manifest, tmp_path):
    layout = ScoreLayout.of(dataset)
    killed = ScoreWriter(tmp_path / "scores", make_manifest(), layout)
    killed.write(numbers(dataset, first=0, last=1))
    killed.write(numbers(dataset, first=1, last=2))
    assert not (tmp_path / "scores").exists()
    again = ScoreWriter(tmp_path / "scores", make_manifest(versions={"torch": "3"}), layout)
    assert again.pairs == 2
    again.write(numbers(dataset, first=2, last=3))
    again.finish()
    cache = ScoreCache.load(tmp_path / "scores", dataset)
    assert cache.of(torch.arange(3)).ref_logps.tolist() == [0, 2, 4, 1, 3, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


@pytest.mark.parametrize("torn", [0, 1])
def test_a_torn_shard_and_what_follows_are_made_again(torn, dataset, make_manifest, tmp_path):
    layout = ScoreLayout.of(dataset)
    killed = ScoreWriter(tmp_path / "scores", make_manifest(), layout)
    killed.write(numbers(dataset, first=0, last=1))
    killed.write(numbers(dataset, first=1, last=2))
    path = unfinished(tmp_path / "scores") / f"scores-0000{torn}.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert ScoreWriter(tmp_path / "scores", make_manifest(), layout).pairs == torn
    assert len(list(path.parent.glob("*.safetensors"))) == torn


CHANGES = [{"kappa": 1.0}, {"teacher": "f" * 64}, {"value_dtype": "float16"}, {"dataset": "e" * 64}]


@pytest.mark.parametrize("change", CHANGES)
def test_a_killed_pass_over_something_else_is_not_gone_on_with(change, dataset, make_manifest, tmp_path):
    layout = ScoreLayout.of(dataset)
    ScoreWriter(tmp_path / "scores", make_manifest(), layout).write(numbers(dataset, first=0, last=1))
    assert ScoreWriter(tmp_path / "scores", make_manifest(**change), layout).pairs == 0
    assert not list(unfinished(tmp_path / "scores").glob("*.safetensors"))


def test_an_unfinished_folder_is_refused(dataset, make_manifest, tmp_path):
    ScoreWriter(tmp_path / "scores", make_manifest(), ScoreLayout.of(dataset)).write(numbers(dataset, first=0, last=1))
    with pytest.raises(ValueError, match="names 1 shards of a run that is not finished"):
        ScoreCache.load(unfinished(tmp_path / "scores"), dataset)


def test_scoring_again_replaces(write, dataset, tmp_path):
    write(tmp_path / "scores", kappa=0.7)
    write(tmp_path / "scores", shard=3, kappa=1.0)
    assert ScoreCache.load(tmp_path / "scores", dataset).manifest.kappa == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]
    assert {p.name for p in (tmp_path / "scores").iterdir()} == {MANIFEST, SHARD}


def test_a_full_disk_keeps_the_old_scores_and_the_whole_shards(write, dataset, make_manifest, tmp_path, monkeypatch):
    write(tmp_path / "scores", kappa=0.7)
    layout = ScoreLayout.of(dataset)
    writer = ScoreWriter(tmp_path / "scores", make_manifest(kappa=1.0), layout)
    writer.write(numbers(dataset, 1.0, 0, 1))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tvkd_fast.scoring.cache.save_file", full)
        with pytest.raises(ValueError, match=r"could not save scores to .*No space left.* to resume at pair 1 of 3"):
            writer.write(numbers(dataset, 1.0, 1, 3))
    assert ScoreCache.load(tmp_path / "scores", dataset).manifest.kappa == 0.7
    assert ScoreWriter(tmp_path / "scores", make_manifest(kappa=1.0), layout).pairs == 1


def test_a_folder_of_other_things_is_never_replaced(make_manifest, dataset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="holds other things than scores: give --output_dir a folder of its own"):
        ScoreWriter(tmp_path / "run", make_manifest(), ScoreLayout.of(dataset))
    assert (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("field", ["dataset", "tokenizer", "teacher", "reference", "precision"])
def test_scores_of_something_else_are_refused_by_name(field, write, dataset, tmp_path):
    cache = ScoreCache.load(write(tmp_path / "scores"), dataset)
    cache.check(**{field: getattr(cache.manifest, field)})
    cache.check(**{field: None})
    with pytest.raises(ValueError, match=f"made with another {field} .*run `tvkd score` again"):
        cache.check(**{field: "0" * 64})


def test_scores_at_another_kappa_are_refused(write, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"made with another kappa \(0\.7, wanted 1\.0\)"):
        ScoreCache.load(write(tmp_path / "scores"), dataset).check(kappa=1.0)


def test_scores_of_other_data_are_refused_by_their_sizes(write, dataset, tmp_path):
    write(tmp_path / "scores")
    with pytest.raises(ValueError, match=r"holds 3 pairs and .* it was made of other data"):
        ScoreCache.load(tmp_path / "scores", dataset[:2])
    longer = [replace(dataset[0], chosen_ids=[3, 9]), replace(dataset[1], chosen_ids=[6, 6, 9]), dataset[2]]
    with pytest.raises(ValueError, match=rf"{SHARD} holds other pairs than the data"):
        ScoreCache.load(write(tmp_path / "small", shard=1), longer)


def test_a_folder_without_scores_names_the_command(tmp_path, dataset):
    with pytest.raises(ValueError, match=r"no score cache at .* make one with `tvkd score"):
        ScoreCache.load(tmp_path, dataset)


def test_a_later_format_is_refused(write, tmp_path):
    path = write(tmp_path / "scores") / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 6}))
    with pytest.raises(
        ValueError, match=r"manifest.json is of format 6, this library reads 3, 4 and 5: run `tvkd score`"
    ):
        read_manifest(tmp_path / "scores")


def test_an_older_fingerprint_is_read_and_compared_with_no_model(write, dataset, tmp_path):
    cache = ScoreCache.load(write(tmp_path / "scores"), dataset)
    cache.check(kappa=0.7, precision="float32", tokenizer="t" * 64)
    for name in ("teacher", "reference"):
        with pytest.raises(ValueError, match=rf"this run's {name} cannot be determined: .* run `tvkd score` again"):
            cache.check(**{name: f"model:{'e' * 64}"})


def test_a_cache_says_what_is_in_it(write, tmp_path):
    text = describe(write(tmp_path / "scores"))
    size = "3 pairs, 21 response states, 2 shards"
    assert all(words in text for words in ("e" * 64, "kappa             0.7", size, "LSE(kappa z)", "torch 2"))
    assert "LSE(kappa z)" not in describe(write(tmp_path / "one", kappa=1.0))


def test_a_thousand_corruptions_are_refused_by_the_file(write, dataset, tmp_path):
    whole = write(tmp_path / "whole")
    names = sorted(path.name for path in whole.iterdir())
    generator = torch.Generator().manual_seed(0)
    draw = lambda high: int(torch.randint(high, (), generator=generator))  # noqa: E731
    for trial in range(1000):
        folder = tmp_path / "scores"
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        name = names[trial % len(names)]
        content = (whole / name).read_bytes()
        at = draw(len(content))
        damaged = {
            0: content[:at],
            1: content[:at] + bytes([content[at] ^ (1 << draw(8))]) + content[at + 1 :],
            2: content[:at] + bytes([draw(256)]) * (1 + draw(64)) + content[at:],
            3: content[:at] + content[at + 1 + draw(32) :],
            4: content[at:] + content[:at] if at else content[:-1],
        }[draw(5)]
        (folder / name).write_bytes(damaged)
        if damaged == content:
            continue
        with pytest.raises(ValueError, match=re.escape(str(folder / name))):
            ScoreCache.load(folder, dataset)


@pytest.mark.parametrize("shard", [1, 2])
def test_the_first_pair_that_differs_is_named(shard, dataset, make_manifest, tmp_path):
    whole = PairDataset(dataset, TokenReport("", 3, 9, "keep_start"))
    for name, digests in (("new", whole.pair_digests), ("old", ())):
        writer = ScoreWriter(tmp_path / name, make_manifest(), ScoreLayout.of(dataset), digests)
        for first in range(0, 3, shard):
            writer.write(numbers(dataset, first=first, last=min(first + shard, 3)))
        writer.finish()
        assert len(ScoreCache.load(tmp_path / name, dataset).pieces) == -(-3 // shard)
    folders = [str(tmp_path / "new"), str(tmp_path / "old")]
    for last, ended in ((dataset[2], False), (replace(dataset[2], prompt_ids=[1, 2]), True)):
        other = PairDataset([*dataset[:2], replace(last, rejected_ended=ended)], whole.report)
        assert first_difference(folders, other) == f"row 2 is the first that differs from {folders[0]}"
        assert first_difference(folders[1:], other) == ""
    assert first_difference(folders, PairDataset(dataset[:1], whole.report)).endswith("the first 1 are the same")
