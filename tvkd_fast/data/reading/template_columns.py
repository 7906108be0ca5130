"""The values that a row gives its chat template, and errors for what the template cannot write."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from tvkd_fast.data.chat_template import apply_template
from tvkd_fast.data.pairs import BadPair, Message, Preference
from tvkd_fast.data.reading.messages import carries_nothing, unwritten

if TYPE_CHECKING:
    from jinja2 import nodes
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_OWN = {
    *("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"),
    *("raise_exception", "strftime_now"),
}
"""Variables of every template, which no other column of a row can mean."""
_NO_VARIABLES = frozenset({"messages", "conversations", "tokenizer"})
"""Variables that the template's caller passes, beside the arguments of `apply_chat_template`."""


def write_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    given: Mapping[str, Any],
    row: str,
    *,
    add_generation_prompt: bool,
) -> str:
    """Returns the conversation as the tokenizer's template writes it.

    Args:
        tokenizer, messages, add_generation_prompt: as `apply_chat_template` takes them.
        given: what else the template is given: `tools`, `documents` and its own variables.
        row: where the conversation came from.

    Raises:
        BadPair: the template fails, for whatever reason: it is a program of the tokenizer's author.
    """
    from jinja2 import TemplateError

    taken = (_arguments(type(tokenizer).apply_chat_template) | _NO_VARIABLES) & given.keys()
    if taken:
        remedy = "Remove it from chat_template_kwargs, which are the template's own variables"
        raise BadPair(row, "an argument that is no variable of the template", ", ".join(sorted(taken)), remedy)
    try:
        text = apply_template(
            tokenizer, list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **given
        )
    except Exception as error:
        # What a template raises of itself is a TemplateError and needs no name.
        kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
        remedy = "Mend the row or the template, or leave such rows out with --data.bad_pairs drop"
        raise BadPair(row, "refused by the chat template", f"{kind}{error}", remedy) from error
    assert isinstance(text, str)
    return text


def variables_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Names that the tokenizer's templates read before they set them; empty where they cannot be parsed."""
    from jinja2 import Environment, TemplateError, meta

    templates = tokenizer.chat_template or {}
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    found: set[str] = set()
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        try:
            program = environment.parse(_GENERATION.sub("", template))
            found |= meta.find_undeclared_variables(program) - _set_first(program)
        except TemplateError:  # writing the first conversation says what is wrong with it
            continue
    return frozenset(found - _OWN)


def _set_first(program: nodes.Template) -> set[str]:
    """Names that a template sets before it reads them, such as in one branch of several: jinja takes them for given."""
    seen: dict[str, str] = {}
    for name, use in _uses(program):
        seen.setdefault(name, use)
    return {name for name, use in seen.items() if use == "store"}


def _uses(node: nodes.Node) -> Iterator[tuple[str, str]]:
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        yield node.name, node.ctx
    if isinstance(node, nodes.Macro):
        yield node.name, "store"
    inner = list(node.iter_child_nodes())
    if isinstance(node, nodes.Assign | nodes.For):
        # What is assigned is read first.
        inner.sort(key=lambda child: child is not (node.node if isinstance(node, nodes.Assign) else node.iter))
    for child in inner:
        yield from _uses(child)


def check_columns(pair: Preference, variables: frozenset[str]) -> None:
    """Raises BadPair where a template would read a variable that the row has as a column, which it is not given."""
    asked = sorted(variables.intersection(pair.unread) - pair.template.keys())
    if asked:
        remedy = "Put it into a column chat_template_kwargs, or rename the column"
        raise BadPair(pair.row, "a column has the name of a variable of the chat template", ", ".join(asked), remedy)


def carried(pair: Preference) -> list[str]:
    """Names of what the pair carries beside roles and contents, which only a template can write."""
    parts = [part for part in (pair.prompt, pair.chosen, pair.rejected) if not isinstance(part, str)]
    given = [name for name, value in pair.template.items() if not carries_nothing(value)]
    return [*given, *(f"{name} in messages" for name in unwritten([m for part in parts for m in part]))]


def check_without_template(pair: Preference) -> None:
    """Raises BadPair where a conversation carries what only a template can write."""
    names = carried(pair)
    if names:
        remedy = "Use the tokenizer's own chat template, give it one, or remove the columns and fields"
        raise BadPair(pair.row, "only a chat template can write what the row carries", ", ".join(names), remedy)


@cache
def _arguments(apply: Callable[..., Any]) -> frozenset[str]:
    """Arguments of `apply_chat_template` that set how it is applied."""
    named = inspect.signature(apply).parameters.values()
    return frozenset(x.name for x in named if x.kind is not x.VAR_KEYWORD) - {"tools", "documents"}
