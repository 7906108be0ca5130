"""RewardBench's rows and the weights of its sections."""

from dataclasses import replace
from typing import Any

import pytest

from tvkd_fast.data import BadPair, build_dataset
from tvkd_fast.data.reading.formats import to_preference
from tvkd_fast.evaluation.rewardbench import SECTIONS, section_weights, to_rewardbench

ROW = {"id": 3, "subset": "llmbar-natural", "prompt": "Say a.", "chosen": "a", "rejected": "b"}


def test_a_row_is_a_conversation_that_knows_its_subset():
    pair = to_rewardbench(ROW, "row 0")
    assert pair.prompt == [{"role": "user", "content": "Say a."}]
    assert pair.chosen == [{"role": "assistant", "content": "a"}]
    assert pair.rejected == [{"role": "assistant", "content": "b"}]
    assert pair.subset == "llmbar-natural"
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi."}]
    assert to_rewardbench(ROW | {"prompt": turns}, "row 0").prompt == turns


@pytest.mark.parametrize("change", [{"subset": None}, {"subset": ""}, {"chosen": ""}, {"prompt": None}])
def test_a_row_of_another_format_is_refused(change):
    with pytest.raises(BadPair, match=f"row 7.*without {next(iter(change))}"):
        to_rewardbench(ROW | change, "row 7")


def test_equal_answers_are_refused():
    with pytest.raises(BadPair, match="chosen equals rejected"):
        to_rewardbench(ROW | {"rejected": "a"}, "row 7")


def test_sections_have_the_papers_sizes():
    """Table 1 of arXiv 2403.13787: 358, 456 and 740 pairs; 984 of code, and as much weight of mathematics."""
    assert {name: sum(weights.values()) for name, weights in SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 2 * 984,
    }
    assert sum(len(weights) for weights in SECTIONS.values()) == 23


def test_weights_are_shares_of_what_is_there():
    found = section_weights({"llmbar-natural", "mt-bench-hard", "hep-go", "of my own"})
    assert found == {
        "Chat Hard": {"mt-bench-hard": pytest.approx(37 / 137), "llmbar-natural": pytest.approx(100 / 137)},
        "Reasoning": {"hep-go": 1.0},
    }


LISTS: dict[str, Any] = ROW | {
    "subset": "Factuality",
    "chosen": ["a"],
    "rejected": ["b", "c", "d"],
    "num_correct": 1,
    "num_incorrect": 3,
}


def answers(record):
    return [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in to_rewardbench(record, "row 7")]


def test_lists_of_answers_are_pairs_of_one_row():
    pairs = to_rewardbench(LISTS, "row 7")
    assert answers(LISTS) == [("a", "b"), ("a", "c"), ("a", "d")]
    assert {pair.row for pair in pairs} == {"row 7"}
    assert {pair.subset for pair in pairs} == {"Factuality"}
    assert pairs[2].prompt == [{"role": "user", "content": "Say a."}]


def test_ties_hold_every_answer():
    ties = LISTS | {"chosen": ["a", "A", "aa"], "rejected": ["b", "c"], "num_correct": 3, "num_incorrect": 2}
    assert answers(ties) == [("a", "b"), ("A", "c"), ("aa", "b")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_correct": 2}, "another number of answers .num_correct is 2, and there are 1"),
        ({"rejected": ["b", "a", "c"]}, "chosen equals rejected"),
        ({"rejected": ["b", "", "c"]}, "empty response .rejected"),
        ({"rejected": []}, "without rejected"),
        ({"rejected": [{"role": "assistant", "content": "b"}]}, "rejected must be a string or a list of strings"),
        ({"chosen": {"a": 1}}, "chosen must be a string or a list of strings"),
    ],
)
def test_lists_that_are_none_of_answers_are_refused(change, message):
    with pytest.raises(BadPair, match=f"row 7: .*{message}"):
        to_rewardbench(LISTS | change, "row 7")


def test_a_row_without_one_of_its_answers_is_no_row(write_jsonl, chatml):
    long = LISTS | {"rejected": ["b", "c", "d" * 60]}
    path = write_jsonl([LISTS, long])
    dataset = build_dataset(path, chatml, max_length=60, truncation="keep_end", overlong="drop", read=to_rewardbench)
    assert [pair.row for pair in dataset] == ["train.jsonl row 0"] * 3
    assert dataset.report.dropped_overlong == 1
    assert dataset.report.dropped_bad == {"another pair of the row was dropped": 2}


def test_the_pairs_of_a_row_are_those_of_rows_of_their_own(write_jsonl, chatml):
    single = [LISTS | {"rejected": [answer], "num_incorrect": 1} for answer in LISTS["rejected"]]
    together = build_dataset(write_jsonl([LISTS]), chatml, read=to_rewardbench)
    alone = build_dataset(write_jsonl(single), chatml, read=to_rewardbench)
    assert [replace(pair, row="") for pair in together] == [replace(pair, row="") for pair in alone]


def test_the_answers_of_a_row_share_one_prompt(write_jsonl, templateless):
    """Test rejected answers of which one is merged with the prompt's end, and another is longer than all."""

    def plain(record, row):
        return [replace(to_preference(record, row), rejected=text) for text in record["others"]]

    path = write_jsonl([{"prompt": "Say a", "chosen": "c", "rejected": "d", "others": ["d", "b", "d" * 9]}])
    whole = build_dataset(path, templateless, read=plain)
    assert {templateless.decode(pair.prompt_ids) for pair in whole} == {"<s>Say "}
    assert [pair.merged for pair in whole] == [True] * 3
    assert [templateless.decode(pair.chosen_ids) for pair in whole] == ["ac<|endoftext|>"] * 3
    decoded = [templateless.decode(pair.rejected_ids) for pair in whole]
    assert decoded[1:] == ["ab<|endoftext|>", f"a{'d' * 9}<|endoftext|>"]
    cut = build_dataset(path, templateless, max_length=13, truncation="keep_end", read=plain)
    assert [pair.prompt_ids for pair in cut] == [whole[0].prompt_ids[-2:]] * 3
    assert cut.report.truncated == 3
