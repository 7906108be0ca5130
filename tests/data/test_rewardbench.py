"""RewardBench's rows and the weights of its sections."""

import pytest

from tvkd_fast.data import BadPair
from tvkd_fast.data.rewardbench import SECTIONS, section_weights, to_rewardbench

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
