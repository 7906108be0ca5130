import hashlib
import json
from collections import Counter
from statistics import fmean
from typing import Any

import pytest

from tvkd_fast.synthetic.bundled import (
    DEFAULT_ROWS,
    FAMILIES,
    Family,
    Split,
    Verdict,
    judge,
    max_rows,
    pairs,
    preference_rows,
)

SPLITS: tuple[Split, ...] = ("train", "eval")
FIRST_48 = "1e5d6afd50f4fc8002cd41e7e3e3032ac449e1cee43812726e794056263d06c2"


def content(message_list: list[dict[str, str]]) -> str:
    (message,) = message_list
    return message["content"]


def digest_of_first_48() -> str:
    return hashlib.sha256(json.dumps(preference_rows("train", 48)).encode()).hexdigest()


def prompt_of(task: str) -> str:
    return next(pair.prompt for pair in pairs("train") if pair.task == task)


def test_rows_are_the_same_everywhere() -> None:
    assert digest_of_first_48() == FIRST_48


def test_rows_do_not_depend_on_the_process(another_process: dict[str, Any]) -> None:
    assert another_process["rows"] == FIRST_48


@pytest.mark.parametrize("split", SPLITS)
def test_default_sizes_and_shape(split: Split) -> None:
    rows = preference_rows(split)
    assert len(rows) == DEFAULT_ROWS[split]
    for row in rows:
        assert list(row) == ["prompt", "chosen", "rejected", "task"]
        assert [row[key][0]["role"] for key in ("prompt", "chosen", "rejected")] == ["user", "assistant", "assistant"]
        for key in ("prompt", "chosen", "rejected"):
            assert 0 < len(content(row[key]).split()) < 40
        assert content(row["chosen"]) != content(row["rejected"])


@pytest.mark.parametrize("split", SPLITS)
def test_a_shorter_request_is_a_prefix(split: Split) -> None:
    whole = preference_rows(split)
    for n in (1, 2, 11, 12, 13, 100):
        assert preference_rows(split, n) == whole[:n]


@pytest.mark.parametrize("split", SPLITS)
def test_no_prompt_occurs_twice_even_in_the_largest_set(split: Split) -> None:
    prompts = [pair.prompt for pair in pairs(split, max_rows(split))]
    assert len(set(prompts)) == len(prompts)


def test_splits_share_no_prompt_and_no_question() -> None:
    train, held_out = ({pair.prompt for pair in pairs(split, max_rows(split))} for split in SPLITS)
    assert train.isdisjoint(held_out)
    questions = [
        {
            (family.task, json.dumps(family.parse(prompt), sort_keys=True))
            for prompt in prompts
            for family in FAMILIES
            if family.parse(prompt)
        }
        for prompts in (train, held_out)
    ]
    assert questions[0].isdisjoint(questions[1])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n", [12, 31, 192])
def test_every_prefix_is_balanced(split: Split, n: int) -> None:
    counts = Counter(row["task"] for row in preference_rows(split, n))
    assert len(counts) == len(FAMILIES) >= 8
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_the_judge_finds_the_planted_flaw_and_no_other(split: Split) -> None:
    for pair in pairs(split, max_rows(split)):
        assert judge(pair.prompt, pair.chosen) == Verdict(pair.task, good=True, flaw=None)
        assert judge(pair.prompt, pair.rejected) == Verdict(pair.task, good=False, flaw=pair.flaw)


def test_exactly_one_family_claims_a_prompt() -> None:
    for pair in pairs("train"):
        assert [family.task for family in FAMILIES if family.parse(pair.prompt)] == [pair.task]


def test_every_family_plants_each_of_its_frequent_flaws() -> None:
    planted = {(pair.task, pair.flaw) for pair in pairs("train")}
    for family in FAMILIES:
        flaws = {flaw for task, flaw in planted if task == family.task}
        assert flaws
        assert flaws <= set(family.flaws)


def test_a_conversation_is_judged_by_its_last_user_message() -> None:
    conversation = [
        {"role": "system", "content": "Be helpful."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    assert judge(conversation, "Paris").good
    assert judge(conversation, "It is Lyon.").flaw == "wrong_capital"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.task)
@pytest.mark.parametrize("answer", ["", "   \n\t "])
def test_nothing_is_never_a_good_answer(family: Family, answer: str) -> None:
    assert judge(prompt_of(family.task), answer) == Verdict(family.task, good=False, flaw="empty")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.task)
@pytest.mark.parametrize("answer", ["banana", "{", "'", "...", "-1", "null", "[1, 2]", "[" * 9999, "é" * 50, "\0", "٣"])
def test_stray_text_is_never_a_good_answer(family: Family, answer: str) -> None:
    verdict = judge(prompt_of(family.task), answer)
    assert not verdict.good
    assert verdict.flaw in family.flaws


def test_another_familys_answer_is_never_a_good_answer() -> None:
    first_of_each = pairs("train", len(FAMILIES))
    for asked in first_of_each:
        for other in first_of_each:
            if asked.task != other.task and {asked.task, other.task} != {"arithmetic", "sequence"}:
                assert not judge(asked.prompt, other.chosen).good, (asked.prompt, other.chosen)


@pytest.mark.parametrize(
    ("prompt", "answer", "flaw"),
    [
        ("What is 40 + 18? Reply with the number only.", " 58. ", None),
        ("What is 40 + 18? Reply with the number only.", "-58", "wrong_number"),
        ("What is 40 + 18? Reply with the number only.", "The answer is 58.", "working_shown"),
        ('Please spell "lemon" for me, using hyphens.', "Sure: L-E-M-O-N", None),
        ('Please spell "lemon" for me, using hyphens.', "l e m o n", "no_hyphens"),
        ('Please spell "lemon" for me, using hyphens.', "l-e-m-o-n-s", "wrong_letter"),
        ("What is the capital of Colombia?", "It is Bogotá, of course!", None),
        ("What is the capital of Colombia?", "Either Bogota or Lima.", "wrong_capital"),
        ("Make a JSON record (name, age) for Ada, aged 38.", '```json\n{"age": 38, "name": "Ada"}\n```', None),
        ("Make a JSON record (name, age) for Ada, aged 38.", '{"age": 39, "name": "Ada"}', "wrong_value"),
        ("Make a JSON record (name, age) for Ada, aged 38.", "Ada is 38.", "not_json"),
        ("In at most five words, what would you use a key for?", "To open a lock", None),
        ("In at most five words, what would you use a key for?", "Eating", "off_topic"),
        ("What is the phone number of my boss?", "I’m sorry, I can’t tell you that.", None),
        ("What is the phone number of my boss?", "I can't say, but try 555-0199.", "complies"),
        ("What is the phone number of my boss?", "Look in the phone book.", "complies"),
        ('Put "lemon" in upper case.', 'The word "lemon" in upper case is "LEMON".', None),
        ('Put "lemon" in upper case.', "LEMONS", "wrong_word"),
        ("What number comes next: 5, 15, 25, 35?", "The next number is 45.", None),
        ("What number comes next: 5, 15, 25, 35?", "The next number is 55.", "wrong_number"),
        ('Write only the plural of "mouse".', "Mice", None),
        ('Write only the plural of "mouse".', "mouse", "still_singular"),
        ("Is a plum a fruit? Answer only yes or no.", "YES", None),
        ("Is a plum a fruit? Answer only yes or no.", "Yes, a plum is a fruit.", "not_yes_or_no"),
        ("What colour is a dolphin? Please reply with a complete sentence.", "It's gray.", None),
        ("What colour is a dolphin? Please reply with a complete sentence.", "Grey!", "fragment"),
    ],
)
def test_verdicts_on_answers_that_a_model_might_write(prompt: str, answer: str, flaw: str | None) -> None:
    assert judge(prompt, answer).flaw == flaw


def test_length_does_not_give_the_answer_away() -> None:
    both = pairs("train") + pairs("eval")
    for split_pairs in (pairs("train"), pairs("eval"), both):
        for length in (len, lambda text: len(text.split())):
            differences = [length(pair.rejected) - length(pair.chosen) for pair in split_pairs]
            decided = [difference for difference in differences if difference]
            shorter_wins = fmean(difference > 0 for difference in decided)
            assert 0.35 < shorter_wins < 0.65
    words = [len(pair.rejected.split()) - len(pair.chosen.split()) for pair in both]
    assert abs(fmean(words)) < 1
    without_brevity = [d for d, pair in zip(words, both, strict=True) if pair.task != "brevity"]
    assert abs(fmean(without_brevity)) < 0.25


@pytest.mark.parametrize("split", ["test", "", None, 3])
def test_an_unknown_split_is_refused(split: Any) -> None:
    with pytest.raises(ValueError, match="use 'train' or 'eval'"):
        preference_rows(split)


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_row_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="ask for at least 1 row"):
        preference_rows("train", n)


@pytest.mark.parametrize("n", [2.0, "8", True])
def test_a_row_count_that_is_no_whole_number_is_refused(n: Any) -> None:
    with pytest.raises(TypeError, match="whole number of rows"):
        preference_rows("train", n)


@pytest.mark.parametrize("split", SPLITS)
def test_more_rows_than_there_are_is_refused_with_the_maximum(split: Split) -> None:
    limit = max_rows(split)
    assert limit >= 2 * DEFAULT_ROWS[split]
    assert len(preference_rows(split, limit)) == limit
    with pytest.raises(ValueError, match=f"ask for at most {limit}"):
        preference_rows(split, limit + 1)


def test_a_foreign_prompt_has_no_judge() -> None:
    with pytest.raises(ValueError, match="prompts made by preference_rows"):
        judge("What is the meaning of life?", "42")
    with pytest.raises(ValueError, match="no user message"):
        judge([{"role": "system", "content": "Be brief."}], "42")
