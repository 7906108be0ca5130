"""Applying chat templates as if on one fixed day, and finding what they write behind an answer."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DAY = datetime(2024, 7, 26)
"""The day that Llama 3.1's template falls back to. Left to the clock, templates write today's date: the tokens of a
dataset would change overnight, and what was scored, trained or resumed with them."""

_MARK = "\ue000"
"""A private character, which no template writes of its own or trims."""
_USER, _ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}},
}
_TRIED = ([_USER, _ANSWER], [{"role": "system", "content": "a"}, _USER, _ANSWER])


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[Any], /, **options: Any) -> Any:
    """`tokenizer.apply_chat_template`, with its options, on `TEMPLATE_DAY`."""
    template = tokenizer.get_chat_template(options.pop("chat_template", None), options.get("tools"))
    options = {"date_string": TEMPLATE_DAY.strftime("%d %b %Y"), **options}
    return tokenizer.apply_chat_template(messages, chat_template=_on_the_day(template), **options)


@lru_cache(maxsize=32)
def _on_the_day(template: str) -> str:
    """The template with a `strftime_now` of its own: transformers hands a template no function."""
    if "strftime_now" not in template:
        return template
    letters = "aAbBcdDeFGgHhIjklmMpPrRsSTuUVwWxXyYzZ"
    codes = {f"%{sign}{letter}": TEMPLATE_DAY.strftime(f"%{sign}{letter}") for letter in letters for sign in ("-", "")}
    return (
        "{% macro strftime_now(format) %}{% for part in format.split('%%') %}{% set day = namespace(text=part) %}"
        f"{{% for code, written in {json.dumps(codes)}.items() %}}"
        "{% set day.text = day.text.replace(code, written) %}{% endfor %}"
        "{{ '' if loop.first else '%' }}{{ day.text }}{% endfor %}{% endmacro %}\n" + template
    )


def template_tails(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns what the tokenizer's templates write behind the last answer: its end and what follows it.

    Each named template is asked, with tools and without, since they may end turns differently. Left out are
    tails that cannot be seen.
    """
    templates = tokenizer.chat_template
    names: list[str | None] = [*templates] if isinstance(templates, dict) else [None]
    asked = [{"chat_template": name, "tools": tools} for name in names for tools in (None, [_TOOL])]
    tails = (_tail_of_the_first_that_is_written(tokenizer, options) for options in asked)
    return list(dict.fromkeys(tail for tail in tails if tail))


def tail_behind(tokenizer: PreTrainedTokenizerBase, messages: list[Any], /, **options: Any) -> str:
    """Returns what the template writes behind the last of these messages, "" where it leaves that out.

    Of a message that carries more than its content, which the template may write on either side of it, the tail is that
    of an answer that does not.
    """
    *before, last = messages
    if last.keys() - {"role", "content"}:
        return _tail_of_the_first_that_is_written(tokenizer, options)
    marked = [*before, {**last, "content": last["content"] + _MARK}]
    written = str(apply_template(tokenizer, marked, tokenize=False, **options))
    return written.rpartition(_MARK)[2] if _MARK in written else ""


def _tail_of_the_first_that_is_written(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    for messages in _TRIED:
        try:
            return tail_behind(tokenizer, messages, **options)
        except _refusals():
            # Some want a system's turn first. A template's error is reported with the row that it refuses.
            continue
    return ""


def _refusals() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError

    # A template is code that indexes, adds and calls what it is given.
    return TemplateError, TypeError, ValueError, LookupError, AttributeError
