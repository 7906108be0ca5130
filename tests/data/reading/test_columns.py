"""Columns of preference sets in the wild: read by a rule, or refused by name."""

from typing import Any

import pytest

from tvkd_fast.data.reading.formats import BadPair, Preference, to_preference

USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
POOR = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERS = {"chosen": "Because.", "rejected": "No."}
PLAIN = Preference("Why?", "Because.", "No.", "row 0")
CHAT = Preference([USER], [GOOD], [POOR], "row 0")
AFTER_SYSTEM = Preference([SYSTEM, USER], [GOOD], [POOR], "row 0")
SHP = {"history": "Why?", "human_ref_A": "Because.", "human_ref_B": "No.", "score_A": 3, "score_B": 9, "post_id": "x"}
SAFE = {"prompt": "Why?", "response_0": "No.", "response_1": "Because.", "is_response_0_safe": True}
HELPSTEER = {"prompt": "Why?", "response_1": "No.", "response_2": "Because.", "split": "train"}


@pytest.mark.parametrize(
    ("record", "pair"),
    [
        pytest.param({"question": "Why?", **ANSWERS}, PLAIN, id="question"),
        pytest.param({"instruction": "Why?", "input": "", **ANSWERS}, PLAIN, id="instruction"),
        pytest.param({"prompt": "Why?", "question": "How?", "context": " Why", **ANSWERS}, PLAIN, id="prompt stands"),
        pytest.param({"prompt": "Why?", "input": "", "history": [], "context": None, **ANSWERS}, PLAIN, id="blank"),
        pytest.param({"prompt": None, "question": "Why?", **ANSWERS}, PLAIN, id="null prompt"),
        pytest.param({"prompt": "Why?", "score_chosen": 1.0, "score_rejected": 9.0, **ANSWERS}, PLAIN, id="scores"),
        pytest.param(
            {"qid": "1", "question": "Why?", "response_j": "Because.", "response_k": "No."}, PLAIN, id="Stack Exchange"
        ),
        pytest.param(
            {"prompt": "Why?", "chosen_response": "Because.", "rejected_response": "No."}, PLAIN, id="answers"
        ),
        pytest.param({**SHP, "labels": 1}, PLAIN, id="SHP"),
        pytest.param({**SHP, "human_ref_A": "No.", "human_ref_B": "Because.", "labels": 0}, PLAIN, id="SHP, B"),
        pytest.param({**SAFE, "better_response_id": 1}, PLAIN, id="PKU"),
        pytest.param({**SAFE, "better_response_id": 1, "safer_response_id": None}, PLAIN, id="PKU, one preference"),
        pytest.param({**HELPSTEER, "preference_strength": 2}, PLAIN, id="HelpSteer2"),
        pytest.param(
            {"context": [USER], "response1": "Because.", "response2": "No.", "overall_preference": -1, "domain": "x"},
            CHAT,
            id="HelpSteer3",
        ),
        pytest.param({"system": "Be brief.", "question": "Why?", **ANSWERS}, AFTER_SYSTEM, id="Orca"),
        pytest.param({"system": "", "question": "Why?", **ANSWERS}, CHAT, id="Orca without a system turn"),
        pytest.param({"system": " \n", "question": "Why?", **ANSWERS}, CHAT, id="a blank system turn"),
        pytest.param(
            {"system": " ", "system_prompt": "Be brief.", "prompt": "Why?", **ANSWERS}, AFTER_SYSTEM, id="one is blank"
        ),
        pytest.param({"system_message": "Be brief.", "prompt": "Why?", **ANSWERS}, AFTER_SYSTEM, id="message"),
        pytest.param({"system_instruction": "Be brief.", "prompt": "Why?", **ANSWERS}, AFTER_SYSTEM, id="instruction"),
        pytest.param(
            {"system": "W", "prompt": "Why?", **ANSWERS},
            Preference([{**SYSTEM, "content": "W"}, USER], [GOOD], [POOR], "row 0"),
            id="letters of the prompt",
        ),
        pytest.param(
            {"system": "Be brief.", "prompt": [{**SYSTEM, "name": "x"}, USER], "chosen": [GOOD], "rejected": [POOR]},
            Preference([{**SYSTEM, "name": "x"}, USER], [GOOD], [POOR], "row 0"),
            id="a system turn with a name",
        ),
        pytest.param(
            {"system": "Be brief.", "prompt": "<|system|>\nBe brief.<|end|>\nWhy?", **ANSWERS},
            Preference("<|system|>\nBe brief.<|end|>\nWhy?", "Because.", "No.", "row 0"),
            id="a system turn that a template wrote",
        ),
        pytest.param(
            {"system": "", "source": "a set", "tools": [], "chosen": "Why? Because.", "rejected": "Why? No."},
            Preference("Why?", " Because.", " No.", "row 0", template={"tools": []}),
            id="implicit beside columns that hold no prompt",
        ),
        pytest.param(
            {"system": "Be brief.", "chosen": [USER, GOOD], "rejected": [USER, POOR]}, AFTER_SYSTEM, id="turns"
        ),
        pytest.param(
            {"system": "Be brief.", "prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [POOR]},
            AFTER_SYSTEM,
            id="the same system turn",
        ),
        pytest.param(
            {"system": "Be brief.", "prompt": "Be brief.\n\nWhy?", **ANSWERS},
            Preference("Be brief.\n\nWhy?", "Because.", "No.", "row 0"),
            id="a prompt that holds it",
        ),
        pytest.param(
            {"prompt": "Why?", "question": None, "source": "x", "chosen": [USER, GOOD], "rejected": [USER, POOR]},
            CHAT,
            id="orpo-dpo-mix",
        ),
        pytest.param(
            {"id": 3, "prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, POOR], "chosen_model": "x"},
            CHAT,
            id="Tulu 3",
        ),
        pytest.param(
            {"input": "x", "history": "y", "chosen": [USER, GOOD], "rejected": [USER, POOR]}, CHAT, id="whole"
        ),
        pytest.param(
            {"id": "a", "chosen-rating": 3, "chosen": "Why? Because.", "rejected": "Why? No."},
            Preference("Why?", " Because.", " No.", "row 0"),
            id="implicit beside labels",
        ),
    ],
)
def test_a_set_is_read_by_its_own_names(record: dict[str, Any], pair: Preference) -> None:
    assert to_preference(record, "row 0") == pair


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param(
            {"question": "a", "context": "b", **ANSWERS}, r"could be the prompt \(question, context\)", id="two"
        ),
        pytest.param(
            {"trajectory": [{"from": "user", "value": "Why?"}], "chosen": "A: so", "rejected": "A: no"},
            r"no column is the prompt by its name \(found: trajectory\)\. Rename the column",
            id="UltraInteract",
        ),
        *(
            pytest.param(
                {name: "Why is that?", "chosen": "It is.", "rejected": "It is not."}, rf"\(found: {name}\)", id=name
            )
            for name in ("source", "topic", "task", "category", "kind")
        ),
        pytest.param(
            {"messages": [USER], "chosen": [GOOD], "rejected": [POOR]},
            r"by its name \(found: messages\)",
            id="messages",
        ),
        pytest.param(
            {"chosen": [GOOD], "rejected": [POOR]}, r"empty prompt \(no column is the prompt, and", id="no prompt"
        ),
        *(
            pytest.param({"prompt": "Why?", name: "It rains.", **ANSWERS}, rf"beside .* part of it \({name}\)", id=name)
            for name in ("input", "history", "context")
        ),
        pytest.param(
            {"prompt": [USER], "history": [{"role": "user", "content": "How?"}], "chosen": [GOOD], "rejected": [POOR]},
            r"part of it \(history\)",
            id="history of messages",
        ),
        pytest.param(
            {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": [GOOD], "rejected": [POOR]},
            "turns are text, and would be written as one turn",
            id="a dialogue beside messages",
        ),
        pytest.param(
            {"prompt": "\n\nHuman: Why?\n\nAssistant:", "system": "Be brief.", **ANSWERS},
            "turns are text, and would be written as one turn",
            id="a dialogue after a system turn",
        ),
        pytest.param(
            {"system": "Be brief.", "chosen": "Why? Because.", "rejected": "Why? No."},
            "a system turn has no place before answers that hold their prompt",
            id="implicit after a system turn",
        ),
        pytest.param(
            {"tools": [{"a": 1}], "functions": [{"b": 1}], "prompt": [USER], "chosen": [GOOD], "rejected": [POOR]},
            "two lists of tools",
            id="tools twice",
        ),
        pytest.param({"request": "Why?", **ANSWERS}, r"by its name \(found: request\)", id="a prompt of another name"),
        pytest.param(
            {**SAFE, "better_response_id": 1, "safer_response_id": 0}, "more than one rule says", id="PKU, two"
        ),
        pytest.param(
            {**SAFE, "better_response_id": -1}, "better_response_id is -1, neither 0 nor 1", id="PKU, neither"
        ),
        pytest.param({**SAFE, "preference": 1}, r"missing column \(found: .*response_0, .*Rename", id="unknown rule"),
        pytest.param({**HELPSTEER, "preference_strength": 0}, "no preference .*preference_strength is 0", id="a tie"),
        pytest.param({**SHP, "labels": "A"}, "labels is 'A', neither 0 nor 1", id="SHP, a letter"),
        pytest.param(
            {"prompt": "Why?", "answers": [{"answer": "a", "rank": 1}]}, r"missing column \(found: answers", id="Nectar"
        ),
        pytest.param(
            {"prompt": "Why?", "chosen": ["a"], "rejected": ["b", "c"]}, "several .*--format rewardbench", id="lists"
        ),
        pytest.param(
            {"prompt": "Why?", "chosen": "a", "rejected": ["b", "c"]}, "several answers in one", id="one, several"
        ),
        pytest.param(
            {"prompt": "Why?", "images": ["x.png"], **ANSWERS}, r"only text is read \(found: images\)", id="images"
        ),
        pytest.param(
            {"prompt": "Why?", "chosen": "[{'role': 'user', 'content': 'a'}]", "rejected": "b"},
            r"messages written as text \(chosen\)",
            id="a list as text",
        ),
        pytest.param(
            {"prompt": [{"from": "human", "value": "Why?"}], "chosen": [GOOD], "rejected": [POOR]},
            "Rename its from and value to role and content",
            id="ShareGPT",
        ),
        pytest.param(
            {"prompt": "Why?", "tools": [{"name": "f"}], **ANSWERS}, r"has no place .*\(tools\)", id="plain tools"
        ),
        pytest.param(
            {"prompt": "Why?", "chat_template_kwargs": {"thinking": False}, **ANSWERS},
            r"\(thinking\)",
            id="plain arguments",
        ),
        pytest.param(
            {"prompt": [USER], "tools": "[{", "chosen": [GOOD], "rejected": [POOR]}, "broken JSON .in tools", id="json"
        ),
        pytest.param(
            {"prompt": [USER], "tools": {"a": 1}, "chosen": [GOOD], "rejected": [POOR]}, "tools is no list", id="dict"
        ),
        pytest.param(
            {"prompt": [USER], "chat_template_kwargs": [1], "chosen": [GOOD], "rejected": [POOR]},
            "chat_template_kwargs is list, not an object",
            id="arguments of another type",
        ),
        pytest.param(
            {"system": "a", "system_prompt": "b", "prompt": "Why?", **ANSWERS}, "two system turns", id="systems"
        ),
        pytest.param(
            {"system": "a", "prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [POOR]},
            "two system turns",
            id="another",
        ),
        pytest.param(
            {"system": 3, "prompt": "Why?", **ANSWERS}, "system is int; it must be a string", id="system of ints"
        ),
        pytest.param(
            {"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [POOR]},
            "without role and content",
            id="silent",
        ),
        pytest.param(
            {"prompt": [USER], "tools": [{"name": "\ud83d"}], "chosen": [GOOD], "rejected": [POOR]},
            r"not valid Unicode \(tools\)",
            id="a surrogate",
        ),
    ],
)
def test_what_could_be_read_as_something_else_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(BadPair, match=f"row 7: .*{message}") as refused:
        to_preference(record, "row 7")
    assert "\n" not in str(refused.value)


def test_messages_keep_what_they_carry_and_lose_nulls() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}
    asked = [{**USER, "name": "Ann"}, {**call, "content": None, "name": None}, {"role": "tool", "content": "3"}]
    thought = {**GOOD, "reasoning_content": "so"}
    pair = to_preference({"prompt": asked, "chosen": [*asked, thought], "rejected": [GOOD]}, "row 0")
    assert pair.prompt == [{**USER, "name": "Ann"}, call, {"role": "tool", "content": "3"}]
    assert (pair.chosen, pair.rejected) == ([thought], [GOOD])


def test_what_the_template_is_given() -> None:
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR], "tools": '[{"name": "f"}]', "documents": None}
    pair = to_preference({**row, "chat_template_kwargs": '{"thinking": false}', "id": 3, "note": None}, "row 0")
    assert pair.template == {"tools": [{"name": "f"}], "thinking": False}
    assert pair.unread == ("id",)
    assert to_preference({**row, "tools": None, "chat_template_kwargs": ""}, "row 0").template == {}
    wrapped = {"type": "function", "function": {"name": "f"}}
    for functions in ([{"name": "f"}], [wrapped], '[{"name": "f"}]'):
        again = {**row, "tools": None, "functions": functions}
        assert to_preference(again, "row 0").template == {"tools": [wrapped]}
