"""Rows of one response with a label, and the responses to other prompts that they are put beside."""

from typing import Any

import pytest

from tvkd_fast.data.pairs import BadPair
from tvkd_fast.data.reading.formats import load_preferences
from tvkd_fast.data.reading.labelled import labelled_or_paired, to_labelled, unpaired, with_mismatched

ROWS: list[dict[str, Any]] = [
    {"prompt": "Say red.", "completion": " red", "label": True},
    {"prompt": "Say red.", "completion": " blue", "label": False},
    {"prompt": "Say sun.", "completion": " sun", "label": 1},
]


def test_a_row_is_a_response_with_its_label() -> None:
    found = to_labelled(ROWS[1], "row 1")
    assert (found.prompt, found.chosen, found.single, found.desirable) == ("Say red.", " blue", True, False)
    turns = {
        name: [{"role": role, "content": name}] for name, role in (("prompt", "user"), ("completion", "assistant"))
    }
    assert to_labelled(turns | {"label": True}, "row").chosen == turns["completion"]


def test_the_other_response_is_the_next_to_another_prompt() -> None:
    found = with_mismatched([to_labelled(row, f"row {i}") for i, row in enumerate(ROWS)])
    assert [pair.rejected for pair in found] == [" sun", " sun", " red"]
    assert [pair.desirable for pair in found] == [True, False, True]
    assert not any(pair.single for pair in found)


def test_a_pair_is_two_responses_with_labels() -> None:
    pair = {"prompt": "Say red.", "chosen": " red", "rejected": " blue"}
    found = unpaired(pair, "row")
    assert [(one.chosen, one.desirable) for one in found] == [(" red", True), (" blue", False)]
    assert unpaired(ROWS[0], "row") == [to_labelled(ROWS[0], "row")]
    assert labelled_or_paired(pair, "row").desirable is None
    assert labelled_or_paired(ROWS[0], "row").desirable is True


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "wanted: prompt, completion, label.*--data.unpair true"),
        ({"prompt": "a", "completion": "b"}, "wanted: label.*--objective sft"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "a label is neither true nor false .label is 'yes'"),
        ({"prompt": "a", "completion": "b", "label": None}, "a label is neither true nor false"),
    ],
)
def test_another_row_is_refused(record: dict[str, Any], words: str) -> None:
    with pytest.raises(BadPair, match=words):
        to_labelled(record, "row 0")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ROWS[0], ROWS[2]], "all 2 responses are desirable.*--objective sft"),
        (ROWS[:2], "no other prompt's response can stand beside row 0"),
    ],
)
def test_rows_that_teach_nothing_are_refused(rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        with_mismatched([to_labelled(row, f"row {i}") for i, row in enumerate(rows)])


def test_pairs_and_labels_are_not_mixed() -> None:
    pair = labelled_or_paired({"prompt": "Say red.", "chosen": " red", "rejected": " blue"}, "row 9")
    with pytest.raises(ValueError, match=r"row 9 is a pair and others are single responses.*--data.unpair true"):
        with_mismatched([to_labelled(ROWS[0], "row 0"), pair])


def test_a_file_of_labels_is_read(tmp_path: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 2)
    assert [pair.desirable for pair in load_preferences(path, read=to_labelled).pairs] == [True, True]
