import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvkd_fast.data.reading.formats import BadPair, Preference, load_preferences, to_preference

PLAIN = {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}
USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
POOR = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}

WriteJsonl = Callable[..., Path]


def test_explicit_plain() -> None:
    assert to_preference(PLAIN, "row 0") == Preference("Why?", " Because.", " No.", "row 0")


def test_reward_bench_columns_are_explicit_plain() -> None:
    record = {"id": "3", "subset": "natural", **PLAIN}
    assert to_preference(record, "row 3") == Preference("Why?", " Because.", " No.", "row 3")


WHOLE = Preference([USER], [GOOD], [POOR], "row 0")


@pytest.mark.parametrize(
    "record",
    [
        pytest.param({"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]}, id="explicit"),
        pytest.param({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, POOR]}, id="prompt repeated"),
        pytest.param({"chosen": [USER, GOOD], "rejected": [USER, POOR]}, id="implicit"),
        pytest.param({"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, POOR]}, id="null prompt"),
        pytest.param({"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, POOR]}, id="string and whole"),
        pytest.param({"prompt": "Why?", "chosen": [GOOD], "rejected": [POOR]}, id="string and answers"),
        pytest.param(
            {
                "dataset": "mix",
                "chosen": [USER, GOOD],
                "rejected": [USER, POOR],
                "chosen_rating": 5.0,
                "rejected_rating": 1.0,
            },
            id="dpo-mix-7k",
        ),
        pytest.param(
            {
                "chosen": [{**USER, "name": None, "tool_calls": None}, GOOD],
                "rejected": [{**USER, "name": None, "tool_calls": None}, POOR],
            },
            id="null fields of a parquet struct",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
                "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
            },
            id="hh",
        ),
    ],
)
def test_one_pair_in_every_conversational_format(record: dict[str, Any]) -> None:
    assert to_preference(record, "row 0") == WHOLE


def test_longer_prompts_keep_their_turns() -> None:
    turns = [SYSTEM, USER, GOOD, USER]
    pair = to_preference({"chosen": [*turns, GOOD], "rejected": [*turns, POOR]}, "row 0")
    assert pair == Preference(turns, [GOOD], [POOR], "row 0")


def test_answers_that_begin_with_the_same_turn_as_the_prompt_ends() -> None:
    pair = to_preference({"prompt": [USER], "chosen": [GOOD, POOR], "rejected": [GOOD, GOOD]}, "row 0")
    assert pair == Preference([USER], [GOOD, POOR], [GOOD, GOOD], "row 0")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: why? A: because", "Q: why? A: no", "Q: why? A:"),
        ("Q: why? A: because", "Q: why? A: beware", "Q: why? A:"),
        ("Q: why?\nbecause", "Q: why?\nno", "Q: why?\n"),
        ("I like cats", "I like cats and dogs", "I like"),
        ("I like cats ", "I like cats", "I like"),
        ("Well  done", "Well  said", "Well "),
        ("Stop\nit", "Stop it", "Stop"),
    ],
)
def test_implicit_plain_prompt_ends_at_the_border_of_a_word(chosen: str, rejected: str, prompt: str) -> None:
    pair = to_preference({"chosen": chosen, "rejected": rejected}, "row 0")
    assert pair == Preference(prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt), "row 0")


def _pair_or_reason(record: dict[str, Any]) -> Preference | str:
    try:
        return to_preference(record, "row 0")
    except BadPair as bad:
        return bad.reason


WORDY = st.text(alphabet="ab c\n", max_size=8)


@given(WORDY, WORDY, WORDY)
def test_implicit_plain_split_recombines_and_cuts_no_word(shared: str, first: str, second: str) -> None:
    chosen, rejected = shared + first, shared + second
    pair = _pair_or_reason({"chosen": chosen, "rejected": rejected})
    if isinstance(pair, str):
        assert pair in {"prompts differ", "empty response", "chosen equals rejected"}
        return
    assert isinstance(pair.prompt, str)
    assert isinstance(pair.chosen, str)
    assert isinstance(pair.rejected, str)
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)
    assert pair.chosen.strip()
    assert pair.rejected.strip()
    assert pair.prompt.strip()
    for answer in (pair.chosen, pair.rejected):
        if not pair.prompt[-1].isspace() and not answer[0].isspace():
            pytest.fail("a word was cut")


TURN = st.text(alphabet="Hum an:\nAé", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(
    st.lists(st.tuples(TURN, TURN), max_size=3),
    TURN,
    st.lists(TURN, min_size=2, max_size=2, unique=True),
)
def test_hh_dialogues_round_trip(history: list[tuple[str, str]], question: str, answers: list[str]) -> None:
    past = "".join(f"\n\nHuman: {asked}\n\nAssistant: {said}" for asked, said in history)
    prompt = f"{past}\n\nHuman: {question}\n\nAssistant:"
    pair = to_preference({"chosen": f"{prompt} {answers[0]}", "rejected": f"{prompt} {answers[1]}"}, "row 0")
    contents = [*(text for turn in history for text in turn), question]
    assert [m["content"] for m in pair.prompt if not isinstance(m, str)] == contents
    assert [m["role"] for m in pair.prompt if not isinstance(m, str)] == ["user", "assistant"] * len(history) + ["user"]
    assert pair.chosen == [{"role": "assistant", "content": answers[0]}]
    assert pair.rejected == [{"role": "assistant", "content": answers[1]}]


HH = "\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param(
            {"question": "Why?", "chosen": "a"},
            r"row 7: missing column \(found: chosen, question; wanted: chosen, rejected and.* prompt\)"
            r"\. Rename the file's columns",
            id="missing column",
        ),
        pytest.param({}, r"missing column \(found: none", id="no columns"),
        pytest.param({**PLAIN, "chosen": 3}, r"wrong type \(chosen is int, rejected is str", id="wrong type"),
        pytest.param({**PLAIN, "rejected": [POOR]}, r"chosen is str, rejected is list", id="mixed answers"),
        pytest.param({**PLAIN, "prompt": [USER]}, r"prompt is list; beside string answers", id="list prompt"),
        pytest.param(
            {"prompt": 3, "chosen": [GOOD], "rejected": [POOR]}, r"prompt is int; it must be", id="int prompt"
        ),
        pytest.param({**PLAIN, "chosen": " \n"}, r"empty response \(chosen\)", id="empty chosen"),
        pytest.param({**PLAIN, "rejected": ""}, r"empty response \(rejected\)", id="empty rejected"),
        pytest.param({"chosen": "Well", "rejected": " "}, r"empty response \(rejected\)", id="empty implicit"),
        pytest.param({"prompt": [USER], "chosen": [], "rejected": [POOR]}, r"empty response \(chosen\)", id="no turns"),
        pytest.param(
            {"prompt": [USER], "chosen": [GOOD], "rejected": [{**POOR, "content": ""}]},
            r"empty response \(rejected\)",
            id="empty turn",
        ),
        pytest.param({"chosen": HH, "rejected": f"{HH} No."}, r"empty response \(chosen\)", id="empty hh turn"),
        pytest.param({**PLAIN, "prompt": ""}, "empty prompt", id="empty prompt"),
        pytest.param({"chosen": [GOOD], "rejected": [POOR]}, "empty prompt", id="conversation without a prompt"),
        pytest.param({**PLAIN, "rejected": " Because."}, "chosen equals rejected", id="equal"),
        pytest.param({"chosen": "a b", "rejected": "a b"}, "chosen equals rejected", id="equal implicit"),
        pytest.param({"chosen": f"{HH} No.", "rejected": f"{HH}  No."}, "chosen equals rejected", id="equal turns"),
        pytest.param(
            {"prompt": [{"from": "human", "value": "Why?"}], "chosen": [GOOD], "rejected": [POOR]},
            r"message without role and content \(in prompt\)",
            id="no role",
        ),
        pytest.param(
            {"prompt": [USER], "chosen": ["Because."], "rejected": [POOR]},
            r"message without role and content \(in chosen\)",
            id="message is a string",
        ),
        pytest.param(
            {"prompt": [USER], "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": [POOR]},
            "role or content is no string",
            id="image content",
        ),
        pytest.param({"chosen": "Yes", "rejected": "No"}, r"prompts differ \(no prompt column", id="nothing shared"),
        pytest.param(
            {"chosen": f"{HH} Because.", "rejected": "\n\nHuman: How?\n\nAssistant: No."},
            r"prompts differ \(2 and 2 turns, of which only the first 0 are the same\)",
            id="hh prompts differ",
        ),
        pytest.param(
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, POOR, USER, POOR]},
            r"prompts differ \(4 and 4 turns, of which only the first 1 are the same\)",
            id="conversations part early",
        ),
        pytest.param(
            {"chosen": [USER, GOOD], "rejected": [{**USER, "role": "system"}, POOR]},
            r"prompts differ \(2 and 2 turns, of which only the first 0",
            id="same words by another speaker",
        ),
        pytest.param(
            {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, POOR]},
            r"prompts differ \(2 and 4 turns",
            id="one conversation goes on",
        ),
        pytest.param(
            {"chosen": [USER, GOOD], "rejected": [USER, USER]},
            r"answer is not the assistant's \(rejected holds a user turn\)",
            id="answer by the user",
        ),
        pytest.param({**PLAIN, "chosen": "\ud83d"}, r"text is not valid Unicode \(chosen\)", id="lone surrogate"),
    ],
)
def test_what_is_no_preference_says_why(record: dict[str, Any], message: str) -> None:
    with pytest.raises(BadPair, match=message) as caught:
        to_preference(record, "train.jsonl row 7")
    assert caught.value.row == "train.jsonl row 7"
    assert str(caught.value).startswith(f"train.jsonl row 7: {caught.value.reason}")


def test_a_preference_is_all_strings_or_all_messages() -> None:
    with pytest.raises(ValueError, match="row 2: prompt, chosen and rejected must be all strings or all lists"):
        Preference("Why?", [GOOD], [POOR], "row 2")


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.json", "train.json.gz"])
def test_json_lines(write_jsonl: WriteJsonl, name: str) -> None:
    loaded = load_preferences(write_jsonl([PLAIN, PLAIN], name))
    assert [pair.row for pair in loaded.pairs] == [f"{name} row 0", f"{name} row 1"]
    assert loaded.dropped == {}
    assert loaded.source.endswith(name)


def test_json_array_over_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text("\n" + json.dumps([PLAIN, PLAIN], indent=2))
    assert [pair.row for pair in load_preferences(path).pairs] == ["pairs.json row 0", "pairs.json row 1"]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"\n{json.dumps(PLAIN)}\n \t\n\r\n{json.dumps(PLAIN)}", encoding="utf-8-sig")
    assert [pair.row for pair in load_preferences(path).pairs] == ["pairs.jsonl row 0", "pairs.jsonl row 1"]


def test_line_separators_inside_a_string_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**PLAIN, "prompt": "one\u2028two\x85"}, ensure_ascii=False), encoding="utf-8")
    assert load_preferences(path).pairs[0].prompt == "one\u2028two\x85"


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "train.parquet")
    loaded = load_preferences(tmp_path / "train.parquet", limit=2)
    assert loaded.pairs == [Preference([USER], [GOOD], [POOR], f"train.parquet row {i}") for i in range(2)]


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([PLAIN, PLAIN])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert [pair.row for pair in load_preferences(tmp_path / "one").pairs] == ["one row 0", "one row 1"]
    assert [pair.row for pair in load_preferences(str(tmp_path / "two"), split="test").pairs] == ["two test row 0"]
    with pytest.raises(
        ValueError, match=r"has no split 'eval': set --data.train_split or --data.eval_split to one of train, test"
    ):
        load_preferences(tmp_path / "two", split="eval")


def test_folder_of_files_picks_the_split(write_jsonl: WriteJsonl) -> None:
    folder = write_jsonl([PLAIN], "set/train-00000-of-00002.jsonl").parent
    write_jsonl([PLAIN, PLAIN], "set/train-00001-of-00002.jsonl.gz")
    write_jsonl([PLAIN], "set/test.jsonl")
    assert [pair.row for pair in load_preferences(folder).pairs] == [
        "train-00000-of-00002.jsonl row 0",
        "train-00001-of-00002.jsonl.gz row 0",
        "train-00001-of-00002.jsonl.gz row 1",
    ]
    assert len(load_preferences(folder, split="test").pairs) == 1
    with pytest.raises(ValueError, match=r"no file of the split 'validation': set --data.train_split or .*test.jsonl"):
        load_preferences(folder, split="validation")


def test_folder_without_split_names_is_read_whole_and_data_is_looked_into(write_jsonl: WriteJsonl) -> None:
    folder = write_jsonl([PLAIN], "clone/data/a.jsonl").parents[1]
    assert len(load_preferences(folder, split="validation").pairs) == 1
    write_jsonl([PLAIN], "clone/data/b.jsonl")
    assert len(load_preferences(folder).pairs) == 2


def test_subset_of_a_folder_is_a_folder_in_it(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([PLAIN], "hh/harmless-base/train.jsonl.gz")
    assert len(load_preferences(path.parents[1], subset="harmless-base").pairs) == 1
    with pytest.raises(ValueError, match=r"has no folder 'helpful-base'.*it holds harmless-base"):
        load_preferences(path.parents[1], subset="helpful-base")
    with pytest.raises(ValueError, match="is a single file and has no subset 'x': leave the subset out"):
        load_preferences(path, subset="x")


def test_limit_counts_rows_read(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([PLAIN, {**PLAIN, "chosen": ""}, PLAIN, PLAIN])
    loaded = load_preferences(path, limit=3, bad_pairs="drop")
    assert [pair.row for pair in loaded.pairs] == ["train.jsonl row 0", "train.jsonl row 2"]
    assert loaded.dropped == {"empty response": 1}


def test_bad_rows_stop_with_a_remedy_or_are_counted(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([PLAIN, {**PLAIN, "chosen": ""}, {"chosen": "Yes", "rejected": "No"}, {**PLAIN, "rejected": ""}])
    message = r"train.jsonl row 1: empty response \(chosen\)\. .*--data.bad_pairs drop"
    with pytest.raises(BadPair, match=message):
        load_preferences(path)
    loaded = load_preferences(path, bad_pairs="drop")
    assert loaded.dropped == {"empty response": 2, "prompts differ": 1}
    assert len(loaded.pairs) == 1


def test_sources_that_hold_nothing(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.jsonl holds no rows: give a source with at least one"):
        load_preferences(write_jsonl([]))
    with pytest.raises(ValueError, match=r"all 2 rows were dropped; the first was none.jsonl row 0: missing column"):
        load_preferences(write_jsonl([{"a": 1}, {"a": 2}], "none.jsonl"), bad_pairs="drop")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no .jsonl, .*parquet file: it holds nothing"):
        load_preferences(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": ', "x.jsonl line 3 is broken JSON .*: write one JSON object a line"),
        (b"[1, 2]\n", "x.jsonl line 1 is not a JSON object but list: write one object with chosen and rejected"),
        (b'{"a": "\xff"}\n', "x.jsonl line 1 is not UTF-8: save the file as UTF-8"),
    ],
)
def test_broken_json_lines_name_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _read(tmp_path / "x.jsonl")


def _read(path: Path) -> list[Preference]:
    """Every row is bad, so that only what is wrong with the file itself can stop the reading."""
    return load_preferences(path, bad_pairs="drop").pairs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": }]', "x.json line 2 is broken JSON .*at column 8"),
        ('[{"a": 1}, 2]', "x.json row 1 is not a JSON object but int"),
        ('{"rows": [\n1]}', "x.json line 1 is broken JSON"),
    ],
)
def test_broken_json_arrays_name_the_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        _read(tmp_path / "x.json")


def test_damaged_files_say_so(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(json.dumps({**PLAIN, "prompt": str(i)}).encode() + b"\n" for i in range(500)))
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz is truncated or damaged after line \d+ .*again"):
        load_preferences(tmp_path / "cut.jsonl.gz")
    middle = len(packed) // 2
    (tmp_path / "flip.jsonl.gz").write_bytes(packed[:middle] + bytes(64) + packed[middle + 64 :])
    with pytest.raises(ValueError, match=r"flip.jsonl.gz is truncated or damaged after line \d+"):
        load_preferences(tmp_path / "flip.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}\n")
    with pytest.raises(ValueError, match=r"plain.jsonl.gz is truncated or damaged after line 0 \(Not a gzipped file"):
        load_preferences(tmp_path / "plain.jsonl.gz")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"bad.parquet is no sound parquet file .*copy or download it again"):
        load_preferences(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    "source", ["nowhere/train.jsonl", "nowhere.parquet", "./nowhere", "/no/where/at/all", "~/no/x"]
)
def test_paths_that_do_not_exist_never_go_to_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match="does not exist: check the path"):
        load_preferences(source)
    with pytest.raises(ValueError, match="does not exist: check the path"):
        load_preferences(Path("owner/name"))


def test_unknown_file_kinds_and_settings(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("chosen,rejected\n")
    with pytest.raises(ValueError, match=r"is no preference file that can be read: use one of \.jsonl"):
        load_preferences(tmp_path / "pairs.csv")
    with pytest.raises(ValueError, match="limit is 0: give a positive number"):
        load_preferences("x.jsonl", limit=0)
    with pytest.raises(ValueError, match="bad_pairs is 'skip': give 'error' or 'drop'"):
        load_preferences("x.jsonl", bad_pairs="skip")  # type: ignore[arg-type]


def test_hub_names_carry_a_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((args, kwargs))
        return [PLAIN, PLAIN]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_preferences("Anthropic/hh-rlhf:harmless-base", split="test", limit=1)
    assert asked == [(("Anthropic/hh-rlhf", None), {"data_dir": "harmless-base", "split": "test"})]
    assert [pair.row for pair in loaded.pairs] == ["Anthropic/hh-rlhf:harmless-base test row 0"]
    load_preferences("owner/name", subset="config")
    assert asked[1] == (("owner/name", "config"), {"data_dir": None, "split": "train"})


def test_a_hub_out_of_reach_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"owner/name: neither a local file or folder of that name nor the hub .*no route to host.*give a .jsonl"
    with pytest.raises(ValueError, match=message):
        load_preferences("owner/name")


def test_hh_files(data_file: Callable[[str], Path]) -> None:
    train = load_preferences(data_file("hh_harmless_train.jsonl.gz"), bad_pairs="drop")
    assert (len(train.pairs), train.dropped) == (1595, {"empty response": 4, "prompts differ": 1})
    held_out = load_preferences(data_file("hh_harmless_eval.jsonl.gz"), bad_pairs="drop")
    assert (len(held_out.pairs), held_out.dropped) == (255, {"prompts differ": 1})
    assert all(pair.prompt[0]["role"] == "user" for pair in train.pairs if not isinstance(pair.prompt, str))


def test_llmbar_file(data_file: Callable[[str], Path]) -> None:
    loaded = load_preferences(data_file("llmbar_natural.jsonl"))
    assert len(loaded.pairs) == 100
    assert all(isinstance(pair.prompt, str) for pair in loaded.pairs)
