"""Answers side by side, as Markdown and as a page that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from tvkd_fast.data.messages import text_of

if TYPE_CHECKING:
    from tvkd_fast.data.formats import Message

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222; }
section { border-top: 1px solid #ccc; padding: 1rem 0; }
.prompt { white-space: pre-wrap; color: #555; margin: 0 0 .8rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
h2 { font-size: .85rem; margin: 0 0 .3rem; color: #c1440e; overflow-wrap: anywhere; }
.answers p { white-space: pre-wrap; margin: 0; overflow-wrap: anywhere; }
"""


def markdown_page(prompts: Sequence[list[Message]], said: Mapping[str, Sequence[str]]) -> str:
    """A section a prompt; what models wrote is quoted as it is, in fences that none of it can close."""
    parts = ["# Answers side by side\n"]
    for i, prompt in enumerate(prompts):
        parts.append(f"## {i + 1}\n\n{_quoted(_conversation(prompt))}\n")
        parts += [f"**{name}**\n\n{_quoted(of_model[i])}\n" for name, of_model in said.items()]
    return "\n".join(parts)


def html_page(prompts: Sequence[list[Message]], said: Mapping[str, Sequence[str]]) -> str:
    """The same, a column a model."""
    sections = []
    for i, prompt in enumerate(prompts):
        cells = "".join(
            f"<div><h2>{escape(name)}</h2><p>{escape(of_model[i])}</p></div>" for name, of_model in said.items()
        )
        asked = escape(_conversation(prompt))
        sections.append(f'<section><p class="prompt">{asked}</p><div class="answers">{cells}</div></section>')
    return page("Answers side by side", STYLE, "\n".join(sections))


def page(title: str, style: str, body: str) -> str:
    """A whole HTML document of a body that is escaped already."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{style}</style>\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def _conversation(prompt: list[Message]) -> str:
    if len(prompt) == 1:
        return text_of(prompt[0])
    return "\n\n".join(f"{turn['role']}: {text_of(turn)}" for turn in prompt)


def _quoted(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join(f"> {line}".rstrip() for line in (fence, *text.splitlines(), fence))
