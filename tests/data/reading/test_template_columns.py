"""The variables of a chat template: everything that a row carries, or a refusal that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tvkd_fast.data import build_dataset
from tvkd_fast.data.reading.formats import BadPair, to_preference
from tvkd_fast.data.reading.template_columns import variables_of
from tvkd_fast.data.retokenize import retokenize
from tvkd_fast.data.tokenization import PairTokenizer

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

WHOLE = (
    "{% if tools %}TOOLS {{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for d in documents or [] %}DOC {{ d.text }}<|im_end|>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.name or '' }}\n"
    "{% if thinking | default(true) and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant \n{% endif %}"
)
"""Writes all that messages and rows are known to carry."""
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm", "day": None}}}
ROW: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "Warm?", "name": "Ann"}],
    "chosen": [{"role": "assistant", "content": "Yes.", "reasoning_content": "it is"}],
    "rejected": [{"role": "assistant", "content": "No.", "reasoning_content": "it is not"}],
}


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({}, {}),
        ({"rejected": [{**ROW["chosen"][0], "reasoning_content": "it is not"}]}, {}),
        ({"chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}, {}),
        (
            {"prompt": [*ROW["prompt"], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "9"}]},
            {},
        ),
        ({"tools": [CALL]}, {"tools": [CALL]}),
        ({"tools": json.dumps([CALL])}, {"tools": [CALL]}),
        ({"tools": []}, {"tools": []}),
        ({"documents": [{"text": "It rains."}]}, {"documents": [{"text": "It rains."}]}),
        ({"chat_template_kwargs": {"thinking": False}}, {"thinking": False}),
        ({"tools": [CALL], "chat_template_kwargs": {"tools": []}}, {"tools": []}),
    ],
)
def test_a_row_is_written_as_transformers_writes_it(
    make_tokenizer: MakeTokenizer, change: dict[str, Any], given: dict[str, Any]
) -> None:
    tokenizer, row = make_tokenizer(WHOLE), ROW | change
    pair = PairTokenizer(tokenizer)(to_preference(row, "row 0"))
    for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        # transformers 5.17 leaves nulls in messages, which a template would write down; later releases take them out.
        messages = [{k: v for k, v in m.items() if v is not None} for m in row["prompt"] + row[name]]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, **given)
        assert tokenizer.decode(pair.prompt_ids + ids) == rendered.rstrip()
    asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True, **given)
    assert tokenizer.decode(pair.prompt_ids) == asked


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ tools | length }}", r"\(TypeError: object of type 'NoneType' has no len\(\)\)"),
        ("{{ missing.field }}", r"\(UndefinedError: 'missing' is undefined\)"),
        ("{% if %}", r"\(TemplateSyntaxError: "),
        ("{{ 1 / 0 }}", r"\(ZeroDivisionError: "),
        ("{{ messages[0]['content'] + 3 }}", r"\(TypeError: "),
        ("{{ raise_exception('one\nand two') }}", r"\(one and two\)"),
    ],
)
def test_whatever_a_template_raises_names_the_row(make_tokenizer: MakeTokenizer, template: str, message: str) -> None:
    with pytest.raises(
        BadPair, match=rf"row 4: refused by the chat template {message}.*\. Mend the row or the templ"
    ) as bad:
        PairTokenizer(make_tokenizer(template))(to_preference(ROW, "row 4"))
    assert "\n" not in str(bad.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template_kwargs": {"tokenize": True}}, r"no variable of the template \(tokenize\)\. Remove it"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, r"\(add_generation_prompt\)"),
        *(
            ({"chat_template_kwargs": {name: "x"}}, rf"no variable of the template \({name}\)\. Remove it")
            for name in ("messages", "tokenizer", "conversation", "conversations", "chat_template")
        ),
        (
            {"thinking": False},
            r"variable of the chat template \(thinking\)\. Put it into a column chat_template_kwargs",
        ),
    ],
)
def test_what_would_be_dropped_is_refused(make_tokenizer: MakeTokenizer, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadPair, match=f"row 4: .*{message}"):
        PairTokenizer(make_tokenizer(WHOLE))(to_preference(ROW | change, "row 4"))


def test_a_column_that_the_template_is_given_stands(make_tokenizer: MakeTokenizer) -> None:
    row = ROW | {"thinking": False, "messages": [], "source": "x", "chat_template_kwargs": {"thinking": True}}
    PairTokenizer(make_tokenizer(WHOLE))(to_preference(row, "row 0"))


def test_variables_of_templates(make_tokenizer: MakeTokenizer) -> None:
    assert variables_of(make_tokenizer(WHOLE)) == {"thinking"}
    tokenizer = make_tokenizer(
        {"default": "{% generation %}{{ a }}{% endgeneration %}", "tool_use": "{{ b }}{{ messages }}"}
    )
    assert variables_of(tokenizer) == {"a", "b"}
    assert variables_of(make_tokenizer("{% if %}")) == frozenset()


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        ("{% for m in messages %}{% if m %}{% set content = m %}{% endif %}{{ content }}{% endfor %}", set()),
        ("{% for m in messages %}{{ m }}{% endfor %}{{ m }}", set()),
        ("{% macro f(x) %}{{ x }}{{ y }}{% endmacro %}{{ f(1) }}", {"y"}),
        ("{% if day is not defined %}{% set day = 1 %}{% endif %}{{ day }}", {"day"}),
        ("{% if messages %}{% set style = style or 'x' %}{% endif %}{{ style }}", {"style"}),
        ("{{ raise_exception('x') }}{{ strftime_now('x') }}{% set n = namespace(a=1) %}{{ n.a }}", set()),
    ],
)
def test_a_name_that_the_template_sets_is_none_of_its_variables(
    make_tokenizer: MakeTokenizer, template: str, variables: set[str]
) -> None:
    assert variables_of(make_tokenizer(template)) == variables


def test_empty_lists_carry_nothing(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    plain = {"prompt": "a ", "chosen": "b", "rejected": "c", "tools": [], "documents": []}
    turns = {name: [{"role": "user", "content": "a"}] for name in ("prompt",)}
    turns |= {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, (plain, {**plain, **turns}))))
    dataset = build_dataset(tmp_path / "pairs.jsonl", make_tokenizer(None))
    assert len(retokenize(dataset, make_tokenizer(None), make_tokenizer(None), max_length=99)) == 2


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_without_a_template_nothing_is_left_out(make_tokenizer: MakeTokenizer, mode: Any) -> None:
    tokenizer = make_tokenizer(WHOLE if mode == "never" else None)
    message = (
        r"only a chat template can write what the row carries \(tools, name in messages, reasoning_content in messages"
    )
    with pytest.raises(BadPair, match=message):
        PairTokenizer(tokenizer, chat_template=mode)(to_preference(ROW | {"tools": [CALL]}, "row 0"))


def test_a_teacher_of_another_template_is_not_asked(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROW))
    dataset = build_dataset(tmp_path / "pairs.jsonl", make_tokenizer(WHOLE))
    message = r"row 0: the teacher's tokens cannot be made: another template .*\(name in messages, reasoning_content"
    with pytest.raises(BadPair, match=message):
        retokenize(dataset, make_tokenizer(WHOLE), make_tokenizer(), max_length=512)
