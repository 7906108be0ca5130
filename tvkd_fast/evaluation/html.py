"""Answers side by side, as Markdown and as a page that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from tvkd_fast.data.reading.messages import text_of

if TYPE_CHECKING:
    from tvkd_fast.data.reading.formats import Message

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222; }
section { border-top: 1px solid #ccc; padding: 1rem 0; }
.prompt { white-space: pre-wrap; color: #555; margin: 0 0 .8rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
h2 { font-size: .85rem; margin: 0 0 .3rem; color: #c1440e; overflow-wrap: anywhere; }
.answers p { white-space: pre-wrap; margin: 0; overflow-wrap: anywhere; }
"""


def markdown_page(prompts: Sequence[str | list[Message]], replies: Mapping[str, Sequence[str]]) -> str:
    """Return one section per prompt; answers are quoted verbatim, in fences that none of them can close."""
    parts = ["# Answers side by side\n"]
    for i, (prompt, answers) in enumerate(_side_by_side(prompts, replies), start=1):
        parts.append(f"## {i}\n\n{_quoted(_conversation(prompt))}\n")
        parts += [f"**{name}**\n\n{_quoted(answer)}\n" for name, answer in answers.items()]
    return "\n".join(parts)


def html_page(prompts: Sequence[str | list[Message]], replies: Mapping[str, Sequence[str]]) -> str:
    """The same as HTML, one column per model."""
    sections = []
    for prompt, answers in _side_by_side(prompts, replies):
        cells = "".join(
            f"<div><h2>{escape(name)}</h2><p>{escape(answer)}</p></div>" for name, answer in answers.items()
        )
        asked = escape(_conversation(prompt))
        sections.append(f'<section><p class="prompt">{asked}</p><div class="answers">{cells}</div></section>')
    return page("Answers side by side", STYLE, "\n".join(sections))


def _side_by_side(
    prompts: Sequence[str | list[Message]], replies: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str | list[Message], dict[str, str]]]:
    """Each prompt with what every model answered to it. Raises ValueError where one has not answered all of them."""
    for prompt, *answers in zip(prompts, *replies.values(), strict=True):
        yield prompt, dict(zip(replies, answers, strict=True))


def page(title: str, style: str, body: str) -> str:
    """A whole HTML document of a body that is escaped already."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{style}</style>\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def _conversation(prompt: str | list[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return text_of(prompt[0])
    return "\n\n".join(f"{turn['role']}: {text_of(turn)}" for turn in prompt)


def _quoted(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join(f"> {line}".rstrip() for line in (fence, *text.splitlines(), fence))
