import json
import re
import shutil

import pytest
import torch

from tvkd_fast.data import ScoreCache, ScoreLayout, ScoreManifest, Scores, collate_pairs
from tvkd_fast.data.scores import MANIFEST, TENSORS, read_manifest
from tvkd_fast.data.tokenization import TokenizedPair


@pytest.fixture
def dataset():
    return [
        TokenizedPair([1, 2], [3, 4, 9], [5, 9], True, True, "row 0"),
        TokenizedPair([1], [6, 9], [7, 7, 7, 9], True, True, "row 1"),
        TokenizedPair([1, 2, 3], [8, 9], [4, 9], True, True, "row 2"),
    ]


@pytest.fixture
def make_cache(dataset):
    def make(kappa=0.7, **changes):
        layout = ScoreLayout(dataset)
        manifest = {
            "dataset": "d" * 64,
            "tokenizer": "t" * 64,
            "teacher": "e" * 64,
            "reference": "r" * 64,
            "precision": "float32",
            "kappa": kappa,
            "pairs": layout.num_pairs,
            "states": layout.num_states,
            "versions": {},
        }
        lse = torch.arange(float(layout.num_states))
        lse_kappa = lse if kappa == 1.0 else -lse
        scores = Scores(torch.arange(6.0).view(3, 2), lse, lse_kappa)
        return ScoreCache(ScoreManifest(**(manifest | changes)), scores, layout)

    return make


@pytest.mark.parametrize("kappa", [1.0, 0.7])
def test_scores_come_back_as_they_were(kappa, make_cache, dataset, tmp_path):
    cache = make_cache(kappa)
    cache.save(tmp_path / "scores")
    loaded = ScoreCache.load(tmp_path / "scores", dataset)
    assert loaded.manifest == cache.manifest
    for name in ("ref_logps", "lse", "lse_kappa"):
        assert torch.equal(getattr(loaded.scores, name), getattr(cache.scores, name))
    size = (tmp_path / "scores" / TENSORS).stat().st_size
    states = cache.layout.num_states
    assert size <= states * (4 if kappa == 1.0 else 8) + 6 * 4 + 512


def test_a_batch_gets_the_numbers_of_its_own_states(make_cache, dataset):
    cache = make_cache()
    batch = collate_pairs([dataset[2], dataset[0]], [2, 0])
    scores = cache.of(batch.pairs)
    assert scores.ref_logps.tolist() == [4, 0, 5, 1]
    bounds = cache.layout.bounds.tolist()
    expected = [bounds[4], bounds[0], bounds[5], bounds[1]]
    assert scores.lse[batch.cu_states[:-1]].tolist() == expected
    assert scores.lse.numel() == batch.states.numel()
    assert torch.equal(scores.lse_kappa, -scores.lse)


def test_saving_again_replaces(make_cache, dataset, tmp_path):
    make_cache(kappa=0.7).save(tmp_path / "scores")
    make_cache(kappa=1.0).save(tmp_path / "scores")
    assert ScoreCache.load(tmp_path / "scores", dataset).manifest.kappa == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]


def test_a_full_disk_leaves_the_old_scores(make_cache, dataset, tmp_path, monkeypatch):
    make_cache(kappa=0.7).save(tmp_path / "scores")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tvkd_fast.data.scores.save_file", full)
    with pytest.raises(ValueError, match=r"could not save scores to .*No space left on device.*is as it was"):
        make_cache(kappa=1.0).save(tmp_path / "scores")
    assert ScoreCache.load(tmp_path / "scores", dataset).manifest.kappa == 0.7
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]


def test_a_folder_of_other_things_is_never_replaced(make_cache, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="holds other things than scores: give --output_dir a folder of its own"):
        make_cache().save(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("field", ["dataset", "tokenizer", "teacher", "reference", "precision"])
def test_scores_of_something_else_are_refused_by_name(field, make_cache):
    cache = make_cache()
    cache.check(**{field: getattr(cache.manifest, field)})
    cache.check(**{field: None})
    with pytest.raises(ValueError, match=f"made with another {field} .*run `tvkd score` again"):
        cache.check(**{field: "0" * 64})


def test_scores_at_another_kappa_are_refused(make_cache):
    with pytest.raises(ValueError, match=r"made with another kappa \(0\.7, wanted 1\.0\)"):
        make_cache(kappa=0.7).check(kappa=1.0)


def test_scores_of_other_data_are_refused_by_their_sizes(make_cache, dataset, tmp_path):
    make_cache().save(tmp_path / "scores")
    with pytest.raises(ValueError, match=r"holds 3 pairs and .* it was made of other data"):
        ScoreCache.load(tmp_path / "scores", dataset[:2])


def test_a_folder_without_scores_names_the_command(tmp_path, dataset):
    with pytest.raises(ValueError, match=r"no score cache at .* make one with `tvkd score"):
        ScoreCache.load(tmp_path, dataset)


def test_a_later_format_is_refused(make_cache, dataset, tmp_path):
    make_cache(format=2).save(tmp_path / "scores")
    with pytest.raises(ValueError, match="not of format 1"):
        read_manifest(tmp_path / "scores")


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_damage_anywhere_is_refused(name, make_cache, dataset, tmp_path):
    make_cache().save(tmp_path / "whole")
    content = (tmp_path / "whole" / name).read_bytes()
    generator = torch.Generator().manual_seed(0)
    for trial in range(40):
        folder = tmp_path / f"scores-{trial}"
        shutil.copytree(tmp_path / "whole", folder)
        at = int(torch.randint(len(content), (), generator=generator))
        cut = content[:at] if trial % 2 else content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
        (folder / name).write_bytes(cut)
        if name == MANIFEST and _is_another_manifest(cut, content):
            # A bit flipped in a manifest's free text makes another fingerprint or version, which `check` refuses.
            assert ScoreCache.load(folder, dataset).manifest != make_cache().manifest
            continue
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            ScoreCache.load(folder, dataset)


def _is_another_manifest(cut, content):
    """Whether the damaged text still reads as a manifest of the right sizes and checksum."""
    try:
        found, whole = json.loads(cut), json.loads(content)
    except ValueError:
        return False
    guarded = ("pairs", "states", "format", "sha256")
    return found.keys() == whole.keys() and all(found[k] == whole[k] for k in guarded)
