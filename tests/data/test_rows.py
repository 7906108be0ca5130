"""Any row at all through the reader, down to the template's text: the right text, or a refusal in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from draws import draws
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tvkd_fast.data import TokenizedPair, build_dataset

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<|im_end|>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for key in m if key not in ('role', 'content') %}{{ key }}={{ m[key] | tojson }};{% endfor %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.just("long " * 300)
NON_EMPTY = TEXT.filter(lambda text: bool(text.strip()) and not text.lstrip().startswith("["))
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
MORE = st.fixed_dictionaries(
    {},
    optional={"reasoning_content": st.none() | TEXT, "tool_calls": st.none() | st.lists(ANY, max_size=2), "name": TEXT},
)
COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "tools",
    "chat_template_kwargs",
    "system",
    "question",
    "response_j",
    "images",
)


def turn(*roles: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda role, content, more: {"role": role, "content": content, **more}, st.sampled_from(roles), NON_EMPTY, MORE
    )


SOUND = st.fixed_dictionaries(
    {
        "prompt": st.lists(turn("system", "user", "assistant", "tool"), min_size=1, max_size=3),
        "chosen": st.lists(turn("assistant"), min_size=1, max_size=2),
        "rejected": st.lists(turn("assistant"), min_size=1, max_size=2),
    },
    optional={"tools": st.none() | st.lists(st.dictionaries(TEXT, ANY, max_size=2), max_size=2), "source": TEXT},
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.just("user") | st.just("assistant") | ANY, "content": TEXT | ANY}
)
WRONG = st.dictionaries(st.sampled_from(COLUMNS) | TEXT, TEXT | st.lists(MESSAGE, max_size=3) | ANY, max_size=6)


def without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def read(row: dict[str, Any], tokenizer: Any, folder: Path) -> TokenizedPair | str:
    """The row as the only one of a file: a pair, or what refused it, which is one line and names the file."""
    (folder / "rows.jsonl").write_text(json.dumps(row))
    try:
        return build_dataset(folder / "rows.jsonl", tokenizer, max_length=2**20)[0]
    except ValueError as refused:
        message = str(refused)
    assert "\n" not in message
    assert "rows.jsonl" in message
    return message


@pytest.fixture(scope="module")
def everything(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return make_tokenizer(TEMPLATE), tmp_path_factory.mktemp("rows")


@draws(2000, fresh=True, suppress_health_check=[HealthCheck.too_slow])
@given(SOUND)
def test_sound_rows_are_written_as_transformers_writes_them(everything: tuple[Any, Path], row: dict[str, Any]) -> None:
    tokenizer, folder = everything
    prompt, *answers = (without_nulls(row[name]) for name in ("prompt", "chosen", "rejected"))
    # Answers may begin with the whole prompt once more.
    answers = [turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns for turns in answers]
    pair = read(row, tokenizer, folder)
    if isinstance(pair, str):
        assert answers[0] == answers[1] or [] in answers or "the same tokens" in pair, pair
        return
    for turns, ids in zip(answers, (pair.chosen_ids, pair.rejected_ids), strict=True):
        rendered = tokenizer.apply_chat_template(prompt + turns, tokenize=False, tools=row.get("tools"))
        found = tokenizer.decode(pair.prompt_ids + ids)
        assert rendered.startswith(found)
        assert not rendered[len(found) :].strip()


@draws(2000, fresh=True, suppress_health_check=[HealthCheck.too_slow])
@given(WRONG)
def test_any_row_is_a_pair_or_refused_in_one_line(everything: tuple[Any, Path], row: dict[str, Any]) -> None:
    read(row, *everything)
