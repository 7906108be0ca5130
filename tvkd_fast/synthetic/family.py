"""The families of synthetic tasks, and the text helpers of their rules."""

import json
import random
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache
from typing import ClassVar, TypeVar

T = TypeVar("T")
Question = dict[str, str]


class Family(ABC):
    """One kind of task: its questions, how they are worded, their answers, and the rule that judges an answer."""

    task: ClassVar[str]
    phrasings: ClassVar[tuple[str, ...]]
    fields: ClassVar[dict[str, str]]
    """The pattern that each field of a phrasing matches."""
    flaws: ClassVar[tuple[str, ...]]
    """All flaws that this family's rule can find in a non-empty answer."""

    @abstractmethod
    def questions(self) -> Iterable[Question]:
        """Every question of the family, each once, as the values of its fields."""

    @abstractmethod
    def good(self, question: Question) -> str:
        """An answer without a flaw."""

    @abstractmethod
    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        """Answers with one flaw each, by the flaw's name."""

    @abstractmethod
    def find_flaw(self, question: Question, answer: str) -> str | None:
        """The first flaw of a non-empty answer."""

    def parse(self, prompt: str) -> Question | None:
        """The question behind a prompt, or None where the prompt is not one of this family's."""
        for pattern in _patterns(self):
            match = pattern.fullmatch(prompt.strip())
            if match and question_key(match.groupdict()) in _known_questions(self):
                return match.groupdict()
        return None


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Return one option. Of `Random`, Python promises only `random()` to stay the same from version to version."""
    return options[int(rng.random() * len(options))]


def misspelt(word: str, rng: random.Random) -> str:
    at = pick(rng, range(len(word)))
    letter = pick(rng, [letter for letter in "aeiou" if letter != word[at]])
    return word[:at] + letter + word[at + 1 :]


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plain(text: str) -> str:
    """The text without outer white space, quotation marks, one final full stop, and accents."""
    bare = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").strip().strip("\"'`").removesuffix(".").strip("\"'`")
    return "".join(c for c in unicodedata.normalize("NFKD", bare) if not unicodedata.combining(c))


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", plain(text).casefold())


@cache
def _known_questions(family: Family) -> frozenset[str]:
    return frozenset(question_key(question) for question in family.questions())


def question_key(question: Question) -> str:
    return json.dumps(question, sort_keys=True)


@cache
def _patterns(family: Family) -> list[re.Pattern[str]]:
    """A family's phrasings as patterns, with a named group for each field."""
    groups = {name: f"(?P<{name}>{pattern})" for name, pattern in family.fields.items()}
    pieces = [re.split(r"\{(\w+)\}", phrasing) for phrasing in family.phrasings]
    return [re.compile("".join(groups[p] if i % 2 else re.escape(p) for i, p in enumerate(parts))) for parts in pieces]
