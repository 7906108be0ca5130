"""Folders: splits as `datasets` has them, and nothing put together by guesswork."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from tvkd_fast.data.reading.formats import load_preferences

MakeFolder = Callable[..., Path]

CARD = """---
configs:
- config_name: base
  data_files:
  - split: train
    path: base/tr*.jsonl
  - split: held_out
    path: [base/held.jsonl]
- config_name: online
  data_files: online/*
{default}---
# Preferences
"""


def pair(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": "yes", "rejected": "no"}


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes a file of one pair under each name, whose prompt is that name, and a README.md if one is given."""

    def make(*names: str, card: str | None = None) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                parquet.write_table(pyarrow.Table.from_pylist([pair(name)]), path)
            else:
                path.write_text(json.dumps(pair(name)) + "\n")
        if card is not None:
            (tmp_path / "README.md").write_text(card)
        return tmp_path

    return make


def read(folder: Path, split: str, subset: str | None = None) -> list[Any]:
    return [pair.prompt for pair in load_preferences(folder, split=split, subset=subset).pairs]


ULTRAFEEDBACK = [f"data/{kind}_{of}-00000-of-00001.parquet" for kind in ("train", "test") for of in ("prefs", "sft")]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        pytest.param(ULTRAFEEDBACK, "test_prefs", id="UltraFeedback"),
        pytest.param(["data/raw-00000-of-00001.jsonl", "data/filtered-00000-of-00001.jsonl"], "filtered", id="bench"),
        pytest.param(["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], "train", id="shards"),
        pytest.param(["train-00000-of-00001-0123abcd.parquet", "test.parquet"], "train", id="an old shard's hash"),
        pytest.param(["a/train.jsonl", "b/train.jsonl", "b/test.jsonl"], "train", id="HH-RLHF"),
        pytest.param(["train/one.jsonl", "train/two.jsonl", "test/one.jsonl"], "train", id="folders"),
        pytest.param(["train_0.jsonl", "train_1.jsonl", "dev.jsonl"], "validation", id="words"),
        pytest.param(["one.jsonl", "two.jsonl"], "train", id="no word at all"),
        pytest.param(["train.jsonl", ".cache/train.jsonl", "LICENSE", "chart.png"], "train", id="not data"),
    ],
)
def test_a_split_is_what_datasets_reads(make_folder: MakeFolder, tmp_path: Path, names: list[str], split: str) -> None:
    folder = make_folder(*names)
    files = datasets.load_dataset_builder(str(folder), cache_dir=str(tmp_path / ".own")).config.data_files[split]
    assert read(folder, split) == [Path(file).relative_to(folder.resolve()).as_posix() for file in files]


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        pytest.param(
            ULTRAFEEDBACK, "test", "no file of the split 'test': .* to one .*test_prefs: .*; train_sft: ", id="no such"
        ),
        pytest.param(["train.jsonl"], "test", r"has \(train: train.jsonl\)", id="the training split alone"),
        pytest.param(["one.jsonl", "two.jsonl"], "test", r"has \(train: one.jsonl, two.jsonl; one: ", id="no word"),
        pytest.param(
            ["train_prefs.jsonl", "train_sft.jsonl"],
            "train",
            "train_prefs.jsonl, train_sft.jsonl may all be of the split 'train', .* one of train_prefs, train_sft",
            id="one word, two things",
        ),
        pytest.param(
            ["train_prefs/a.jsonl", "train_sft/a.jsonl"], "train", "to one of train_prefs, train_sft", id="two folders"
        ),
        pytest.param(
            ["raw-00000-of-00001.jsonl", "filtered-00000-of-00001.jsonl"],
            "train",
            "filtered, raw",
            id="two sets' shards",
        ),
        pytest.param(["train.jsonl", "train.parquet"], "train", "in several formats .*keep one of them", id="twice"),
        pytest.param(["train.csv"], "train", "split 'train' has train.csv: save it as one of .jsonl", id="csv"),
        pytest.param(["data/a-b-00000-of-00001.jsonl"], "a-b", r"but got '{'a-b'}'\.: rename the split", id="a dash"),
        pytest.param(["notes.txt"], "train", "holds no .jsonl, .*: it holds notes.txt", id="no data"),
    ],
)
def test_what_is_no_split_names_those_that_are(
    make_folder: MakeFolder, names: list[str], split: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read(make_folder(*names), split)
    assert "\n" not in str(refused.value)


def test_a_name_tells_apart_what_one_word_does_not(make_folder: MakeFolder) -> None:
    folder = make_folder("train_prefs.jsonl", "train_sft.jsonl", "filtered-00000-of-00001.jsonl")
    assert read(folder, "train_prefs") == ["train_prefs.jsonl"]


def test_one_set_without_a_split_is_any_of_them(make_folder: MakeFolder) -> None:
    assert read(make_folder("pairs_0.jsonl", "pairs_1.jsonl"), "test") == ["pairs_0.jsonl", "pairs_1.jsonl"]


CARDS = ("base/train.jsonl", "base/held.jsonl", "online/pairs.jsonl", "unlisted.jsonl")


def test_the_card_says_what_is_what(make_folder: MakeFolder) -> None:
    folder = make_folder(*CARDS, card=CARD.format(default="  default: true\n"))
    assert read(folder, "train") == ["online/pairs.jsonl"]
    assert read(folder, "held_out", "base") == ["base/held.jsonl"]
    with pytest.raises(
        ValueError, match=r"no file of the split 'test': .* \(train: train.jsonl; held_out: held.jsonl\)"
    ):
        read(folder, "test", "base")
    with pytest.raises(ValueError, match="no folder 'other' for that subset: it has the configurations base, online"):
        read(folder, "train", "other")


def test_cards_that_leave_it_open(make_folder: MakeFolder) -> None:
    folder = make_folder(*CARDS, card=CARD.format(default=""))
    with pytest.raises(ValueError, match=r"several configurations: set --data.subset to one of base, online"):
        read(folder, "train")
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"the YAML of its README.md cannot be read \(.*\): mend it"):
        read(folder, "train")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: gone.jsonl\n---\n")
    with pytest.raises(ValueError, match=r"no file of the split 'train': .*gone.jsonl .*it holds README.md, base"):
        read(folder, "train")


def test_a_name_of_the_card_that_matches_nothing_is_refused(make_folder: MakeFolder) -> None:
    card = "---\nconfigs:\n- config_name: a\n  data_files:\n"
    card += "  - split: train\n    path: [a.jsonl, 'more/*.jsonl']\n  - split: test\n    path: b.jsonl\n---\n"
    folder = make_folder("a.jsonl", "b.jsonl", card=card)
    with pytest.raises(ValueError, match=r"README.md names more/\*.jsonl for the split 'train', which match no file"):
        read(folder, "train")
    assert read(folder, "test") == ["b.jsonl"]


@pytest.mark.parametrize("where", ["", "data/"])
def test_a_shard_that_is_not_there_is_named(make_folder: MakeFolder, where: str) -> None:
    names = [f"{where}train-0000{i}-of-00003.jsonl" for i in range(3)]
    folder = make_folder(names[0], names[2], f"{where}test-00000-of-00001-4f5e.jsonl")
    with pytest.raises(ValueError, match=r"the split 'train' lacks train-00001-of-00003: copy or download"):
        read(folder, "train")
    assert read(folder, "test") == [f"{where}test-00000-of-00001-4f5e.jsonl"]
    assert read(folder / names[0], "train") == [names[0]]
    assert sorted(read(make_folder(names[1]), "train")) == names


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a [v2]*?" / "data"
    folder.mkdir(parents=True)
    (folder / "filtered-00000-of-00001.jsonl").write_text(json.dumps(pair("x")))
    assert read(folder.parent, "filtered") == ["x"]


def test_rows_of_files_of_one_name_are_distinguished(make_folder: MakeFolder) -> None:
    folder = make_folder("a/train.jsonl", "b/train.jsonl")
    rows = [pair.row for pair in load_preferences(folder).pairs]
    assert rows == ["a/train.jsonl row 0", "b/train.jsonl row 0"]


def test_a_damaged_saved_folder_says_so(tmp_path: Path) -> None:
    datasets.Dataset.from_list([pair("x")]).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"saved is no sound folder of save_to_disk \(KeyError: .*save or copy it again"
    ):
        read(tmp_path / "saved", "train")


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(
        ValueError, match=r"train.jsonl line 1 is broken JSON .a Git LFS pointer.: fetch the file itself"
    ):
        read(tmp_path, "train")


@pytest.mark.parametrize("text", ["[" * 100_000, f'{{"prompt": {"9" * 5000}}}'])
def test_json_that_no_parser_takes_names_the_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"train.jsonl line 1 is broken JSON") as refused:
        read(tmp_path, "train")
    assert "\n" not in str(refused.value)
