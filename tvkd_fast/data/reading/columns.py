"""The meaning of preference sets' columns, in the library's own names.

The library's names are `prompt`, `chosen` and `rejected`, and where a row has them they stand. Other names are read by
the rules of this file, or refused by name; none is read as something that it is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvkd_fast.data.pairs import BadPair
from tvkd_fast.data.reading.messages import carries_nothing, is_dialogue, is_list, strings

Record = Mapping[str, Any]

PROMPTS = ("question", "instruction", "query", "input", "history", "context")
"""Names of a prompt where no `prompt` is given; two of them in one row are refused."""
BESIDE = ("input", "history", "context")
"""Columns that may hold more than a `prompt` beside them does, which is refused."""
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")
"""Names of a system turn's text."""
FOR_TEMPLATES = ("tools", "functions", "documents", "chat_template_kwargs")
"""Names of what the chat template is given."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")

_LABELS = re.compile(
    r"(^|[^a-z])(ids?|idx|index|uu?id|hash|source|origin|dataset|subset|split|config|categor(y|ies)|type|kind|domain|"
    r"lang(uage)?s?|locale|license|url|models?|annotators?|author|date|time|timestamp|tags?|topic|labels?|scores?|"
    r"ratings?|ranks?|rewards?|margin|difficulty|version|chosen|rejected)([^a-z]|$)"
)
"""Columns that describe a row, and do not hold its prompt."""
_TOPICS = re.compile(
    r"(^|[^a-z])(source|origin|categor(y|ies)|type|kind|domain|tags?|topic|labels?|difficulty)([^a-z]|$)"
)
"""Columns in which some sets have the question itself."""


@dataclass(frozen=True)
class Named:
    """A row in the library's names. Whether prompt and answers are texts or messages is not looked at yet.

    `prompt` is None where the answers are to hold it. `system` is None where the row has no such column, and "" where
    it is empty. `template` is as in `Preference`; `unread` names the columns that hold something and were not read.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    system: str | None
    template: dict[str, Any]
    unread: tuple[str, ...]


def named(record: Record, row: str) -> Named:
    """Finds prompt, answers, system turn and what the template is given, whichever names they have.

    Raises:
        BadPair: the row has no two answers of which one is preferred, more than one column could be meant, or it holds
            more than text.
    """
    held = [name for name in MEDIA if record.get(name)]
    if held:
        remedy = "Train such rows elsewhere, or remove the column where the text stands by itself"
        raise BadPair(row, "only text is read", f"found: {', '.join(held)}", remedy)
    template = template_arguments(record, row)
    answers, chosen, rejected = _answers(record, row)
    prompt = _prompt_name(record, answers, chosen, rejected, row)
    if prompt is not None and is_list(record[prompt]) and answers != ("chosen", "rejected"):
        # Sets that keep conversations beside the text of two answers.
        chosen, rejected = _as_turn(chosen), _as_turn(rejected)
    if prompt == "prompt":
        _refuse_beside(record, row)
    read = {*answers, prompt, *SYSTEMS, *FOR_TEMPLATES}
    return Named(
        None if prompt is None else record[prompt],
        chosen,
        rejected,
        _system(record, row),
        template,
        tuple(str(name) for name, value in record.items() if value is not None and name not in read),
    )


def template_arguments(record: Record, row: str) -> dict[str, Any]:
    """Returns what the row gives its chat template: `tools`, `documents`, and `chat_template_kwargs` over them.

    Each may be written as JSON text, as tabular files have it. A null is a missing column. `functions` are
    tools, as they were called before.
    """
    given: dict[str, Any] = {}
    for name in ("tools", "documents", "functions"):
        value = _parsed(record.get(name), name, row)
        if value is None:
            continue
        if not is_list(value) or not all(isinstance(item, Mapping) for item in value):
            raise BadPair(row, "wrong type", f"{name} is no list of objects")
        given[name] = list(value)
    functions = given.pop("functions", [])
    if functions and given.get("tools"):
        raise BadPair(row, "two lists of tools", "tools, functions", "Keep one of the columns")
    if functions:
        given["tools"] = [
            function if "function" in function else {"type": "function", "function": function} for function in functions
        ]
    more = _parsed(record.get("chat_template_kwargs"), "chat_template_kwargs", row)
    if more is not None and not isinstance(more, Mapping):
        raise BadPair(row, "wrong type", f"chat_template_kwargs is {type(more).__name__}, not an object")
    return given | {str(name): value for name, value in (more or {}).items()}


def _parsed(value: object, name: str, row: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadPair(row, "broken JSON", f"in {name}: {error}") from None


_Rule = Callable[[Record, tuple[str, ...], str], tuple[Any, Any]]


def _in_order(record: Record, columns: tuple[str, ...], row: str) -> tuple[Any, Any]:
    """The first of two columns is the preferred answer."""
    return record[columns[0]], record[columns[1]]


def _by_place(record: Record, columns: tuple[str, ...], row: str) -> tuple[Any, Any]:
    """The third column is the place of the preferred answer among the first two, 0 or 1."""
    answers, place = (record[columns[0]], record[columns[1]]), record[columns[2]]
    if isinstance(place, bool) or place not in (0, 1):
        raise BadPair(row, "no preference between the answers", f"{columns[2]} is {place!r}, neither 0 nor 1")
    return answers[int(place)], answers[1 - int(place)]


def _by_label(record: Record, columns: tuple[str, ...], row: str) -> tuple[Any, Any]:
    """The third column is 1 where the first answer is preferred, 0 where the second is."""
    return _by_place(record, (columns[1], columns[0], columns[2]), row)


def _by_strength(record: Record, columns: tuple[str, ...], row: str) -> tuple[Any, Any]:
    """The third column is below 0 where the first answer is preferred, above 0 where the second is."""
    first, second, strength = (record[name] for name in columns)
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not (strength < 0 or strength > 0):
        raise BadPair(row, "no preference between the answers", f"{columns[2]} is {strength!r}")
    return (first, second) if strength < 0 else (second, first)


_PREFERRED: tuple[tuple[tuple[str, ...], _Rule], ...] = (
    (("chosen_response", "rejected_response"), _in_order),
    (("response_chosen", "response_rejected"), _in_order),
    (("response_j", "response_k"), _in_order),  # Stack Exchange: j has more votes
    (("human_ref_A", "human_ref_B", "labels"), _by_label),  # SHP
    (("response_0", "response_1", "better_response_id"), _by_place),  # PKU-SafeRLHF, by helpfulness
    (("response_0", "response_1", "safer_response_id"), _by_place),  # PKU-SafeRLHF, by harmlessness
    (("response_1", "response_2", "preference_strength"), _by_strength),  # HelpSteer2
    (("response1", "response2", "overall_preference"), _by_strength),  # HelpSteer3
)
"""Two answers, and where a third column gives the preferred one that column, of sets that document its meaning."""


def _answers(record: Record, row: str) -> tuple[tuple[str, ...], Any, Any]:
    """The columns that are read, the preferred answer, and the other one."""
    if "chosen" in record and "rejected" in record:
        return ("chosen", "rejected"), record["chosen"], record["rejected"]
    fitting = [
        (columns, rule)
        for columns, rule in _PREFERRED
        if all(name in record for name in columns) and record[columns[-1]] is not None
    ]
    if not fitting:
        found = ", ".join(sorted(map(str, record))) or "none"
        wanted = "chosen, rejected and, unless they hold it, prompt"
        remedy = (
            "Rename the file's columns, or make chosen and rejected of them; docs/data.md has the names that are read"
        )
        if "completion" in record:
            remedy = "One response per row is for objectives that compare none, such as --objective sft, or kto"
        raise BadPair(row, "missing column", f"found: {found}; wanted: {wanted}", remedy)
    if len(fitting) > 1:
        fits = "; ".join(", ".join(columns) for columns, _ in fitting)
        remedy = "Remove the columns of all but one, or make columns chosen and rejected"
        raise BadPair(row, "more than one rule says which answer is preferred", fits, remedy)
    columns, rule = fitting[0]
    return columns, *rule(record, columns, row)


def _as_turn(answer: Any) -> Any:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _prompt_name(record: Record, answers: tuple[str, ...], chosen: Any, rejected: Any, row: str) -> str | None:
    """The column that is the prompt; None where the answers hold it."""
    if record.get("prompt") is not None:
        return "prompt"
    if _holds_its_prompt(chosen) and _holds_its_prompt(rejected):
        return None
    held = [name for name in PROMPTS if not carries_nothing(record.get(name))]
    if len(held) > 1:
        raise BadPair(
            row, "more than one column could be the prompt", ", ".join(held), "Make one column prompt of them"
        )
    if held:
        return held[0]
    _refuse_guess({name: record[name] for name in record if name not in answers}, row)
    return None


def _holds_its_prompt(answer: Any) -> bool:
    """Return whether it is a conversation that begins before the answer: messages, or HH-RLHF's turns."""
    if isinstance(answer, str):
        return is_dialogue(answer)
    return bool(is_list(answer) and answer and isinstance(answer[0], Mapping) and answer[0].get("role") != "assistant")


def _refuse_guess(record: Record, row: str) -> None:
    """The beginning that two answers share is their prompt only where no column could hold it."""
    could = sorted(
        str(name)
        for name, value in record.items()
        if name not in (*SYSTEMS, *FOR_TEMPLATES) and not carries_nothing(value) and _could_be_prompt(str(name), value)
    )
    if could:
        remedy = "Rename the column that holds it to prompt; where chosen and rejected begin with it, remove the others"
        raise BadPair(row, "no column is the prompt by its name", f"found: {', '.join(could)}", remedy)


def _could_be_prompt(name: str, value: object) -> bool:
    if not isinstance(value, str | list | tuple | Mapping):
        return False
    if not _LABELS.search(name.lower()):
        return True
    return bool(_TOPICS.search(name.lower())) and any(map(_asks, strings(value)))


def _asks(text: str) -> bool:
    """Return whether a text is more than the name of something."""
    return len(text.split()) > 4 or "\n" in text.strip() or text.rstrip().endswith(("?", ":"))


def _refuse_beside(record: Record, row: str) -> None:
    """Raises BadPair where a column beside the prompt holds text that the prompt does not."""
    prompt = "\n".join(strings(record["prompt"]))
    more = [name for name in BESIDE if any(text.strip() not in prompt for text in strings(record.get(name)))]
    if more:
        remedy = "Write it into the prompt, or remove the column"
        raise BadPair(row, "a column beside the prompt may be part of it", ", ".join(more), remedy)


def _system(record: Record, row: str) -> str | None:
    """The text of a system turn; "" where its columns are blank, and None where there is none."""
    if not any(name in record for name in SYSTEMS):
        return None
    held: dict[str, str] = {}
    for name in SYSTEMS:
        text = record.get(name)
        if carries_nothing(text):
            continue
        if not isinstance(text, str):
            raise BadPair(row, "wrong type", f"{name} is {type(text).__name__}; it must be a string")
        if text.strip():
            held[name] = text
    if len(set(held.values())) > 1:
        raise BadPair(row, "two system turns", ", ".join(held), "Keep one of the columns")
    return next(iter(held.values()), "")
