"""Rows of one response, of none, and with the token ids in which they were sampled."""

import pytest

from tvkd_fast.data import BadPair, tokenize_pair
from tvkd_fast.data.reading.formats import to_preference, to_prompt, to_response
from tvkd_fast.data.tokenizer_fingerprint import fingerprint_tokenizer

ASKED = [{"role": "user", "content": "say ab"}]
SAID = [{"role": "assistant", "content": "ab"}]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "say ab: ", "completion": "ab"}, ("say ab: ", "ab", "")),
        ({"prompt": ASKED, "completion": SAID}, (ASKED, SAID, [])),
        ({"prompt": ASKED, "completion": "ab"}, (ASKED, SAID, [])),
        ({"prompt": "say ab", "completion": SAID}, (ASKED, SAID, [])),
        (
            {"prompt": "say ab", "completion": "ab", "system": "s"},
            ([{"role": "system", "content": "s"}, *ASKED], SAID, []),
        ),
        ({"prompt": "say ab: ", "chosen": "ab", "rejected": "no"}, ("say ab: ", "ab", "no")),
    ],
)
def test_a_row_of_one_response(row, wanted):
    pair = to_response(row, "row 0")
    assert (pair.prompt, pair.chosen, pair.rejected) == wanted
    assert pair.single == (not wanted[2])


@pytest.mark.parametrize("prompt", ["say ab", ASKED])
def test_a_row_of_a_prompt_alone(prompt):
    pair = to_prompt({"prompt": prompt, "task": "x"}, "row 0")
    assert pair.prompt == prompt


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "ab"}, "wanted: prompt"),
        ({"prompt": "a", "completion": " "}, "empty response"),
        ({"prompt": " ", "completion": "ab"}, "empty prompt"),
        ({"prompt": ASKED, "completion": [{"role": "user", "content": "ab"}]}, "answer is not the assistant's"),
    ],
)
def test_a_bad_row_is_refused(row, message):
    with pytest.raises(BadPair, match=message):
        to_response(row, "row 0")


def test_who_reads_pairs_refuses_one_response():
    with pytest.raises(
        BadPair, match="One response per row is for objectives that compare none, such as --objective sft"
    ):
        to_preference({"prompt": "a", "completion": "b"}, "row 0")


@pytest.mark.parametrize("row", [{"prompt": "say ab: ", "completion": "ab"}, {"prompt": ASKED, "completion": SAID}])
def test_one_response_has_the_tokens_that_it_has_in_a_pair(row, chatml):
    other = "no" if isinstance(row["prompt"], str) else [{"role": "assistant", "content": "no"}]
    single = tokenize_pair(to_response(row, "row 0"), chatml)
    pair = tokenize_pair(to_preference({**row, "chosen": row["completion"], "rejected": other}, "row 0"), chatml)
    assert (single.prompt_ids, single.chosen_ids) == (pair.prompt_ids, pair.chosen_ids)
    assert (single.rejected_ids, single.rejected_ended) == ([], False)


def sampled(tokenizer, **changes):
    row = {"prompt": ASKED, "chosen": SAID, "rejected": [{"role": "assistant", "content": "no"}]}
    # "ab" is one token of the tokenizer; the model has said it in two.
    ids = {"prompt_ids": [1, 9], "chosen_ids": [70, 71, 2], "rejected_ids": [80], "tokenizer": tokenizer}
    return row | ids | {"chosen_ended": True, "rejected_ended": False} | changes


def test_sampled_ids_are_not_made_again(chatml, make_tokenizer):
    row = sampled(fingerprint_tokenizer(chatml))
    pair = tokenize_pair(to_preference(row, "row 0"), chatml)
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ([1, 9], [70, 71, 2], [80])
    assert (pair.chosen_ended, pair.rejected_ended, pair.sampled) == (True, False, True)
    other = tokenize_pair(to_preference(row, "row 0"), make_tokenizer(eos="<|eot_id|>"))
    assert not other.sampled
    assert other.chosen_ids != pair.chosen_ids
    # Ids whose tokenizer is not told may be anybody's.
    del row["tokenizer"]
    assert not tokenize_pair(to_preference(row, "row 0"), chatml).sampled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_ids": [3.5]}, "chosen_ids is no list of token ids"),
        ({"prompt_ids": []}, "prompt_ids is no list of token ids"),
        ({"rejected_ids": [-1]}, "rejected_ids is no list of token ids"),
        ({"chosen_ended": 1}, "chosen_ended is 1, neither true nor false"),
    ],
)
def test_ids_that_are_none_are_refused(changes, message):
    with pytest.raises(BadPair, match=message):
        to_preference(sampled("t", **changes), "row 0")
