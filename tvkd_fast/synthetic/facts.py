"""Questions with one right answer: arithmetic, spelling, capitals, numbers, sorting, plurals."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from itertools import permutations, product
from typing import ClassVar

from tvkd_fast.synthetic.family import Family, Question, misspelt, pick, plain, words_of
from tvkd_fast.synthetic.words import CAPITALS, PLURALS, WORDS


class Arithmetic(Family):
    task = "arithmetic"
    phrasings = (
        "What is {a} {op} {b}? Reply with the number only.",
        "{a} {op} {b} = ? Give only the number.",
        "Work out {a} {op} {b}. Just the number, please.",
        "Calculate {a} {op} {b} and answer with the number alone.",
        "Please give me the result of {a} {op} {b} as a bare number.",
    )
    fields: ClassVar = {"a": r"\d{2}", "op": r"[+-]", "b": r"\d{2}"}
    flaws = ("wrong_number", "working_shown")

    def questions(self) -> Iterable[Question]:
        for a, b in product(range(10, 100), repeat=2):
            yield {"a": str(a), "op": "+", "b": str(b)}
            if a > b:
                yield {"a": str(a), "op": "-", "b": str(b)}

    def good(self, question: Question) -> str:
        a, b = int(question["a"]), int(question["b"])
        return str(a + b if question["op"] == "+" else a - b)

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        right = int(self.good(question))
        wrong = abs(right + pick(rng, (-10, -2, -1, 1, 2, 10)))
        return {
            "wrong_number": str(wrong if wrong != right else right + 1),
            "working_shown": "{a} {op} {b} = ".format(**question) + str(right),
        }

    def find_flaw(self, question: Question, answer: str) -> str | None:
        right = self.good(question)
        if plain(answer) == right:
            return None
        return "working_shown" if re.findall(r"-?\d+", answer)[-1:] == [right] else "wrong_number"


class Spelling(Family):
    task = "spelling"
    phrasings = (
        'Spell the word "{word}" letter by letter, with hyphens between the letters.',
        'How do you spell "{word}"? Put a hyphen between the letters.',
        'Write out the letters of "{word}" joined by hyphens.',
        'Please spell "{word}" for me, using hyphens.',
        'Break "{word}" into single letters separated by hyphens.',
    )
    fields: ClassVar = {"word": r"[a-z]+"}
    flaws = ("wrong_letter", "no_hyphens")

    def questions(self) -> Iterable[Question]:
        return ({"word": word} for word in WORDS)

    def good(self, question: Question) -> str:
        return "-".join(question["word"])

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        return {
            "wrong_letter": "-".join(misspelt(question["word"], rng)),
            "no_hyphens": question["word"],
        }

    def find_flaw(self, question: Question, answer: str) -> str | None:
        found = plain(answer).casefold()
        hyphenated = re.findall(r"\b[a-z](?:-[a-z])+\b", found)
        if hyphenated == [self.good(question)]:
            return None
        return "no_hyphens" if not hyphenated and question["word"] in re.sub(r"[^a-z]", "", found) else "wrong_letter"


class Capitals(Family):
    task = "capitals"
    phrasings = (
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "Name the capital city of {country}.",
        "Tell me the capital of {country}, please.",
        "I am visiting {country}. What is its capital?",
    )
    fields: ClassVar = {"country": r"[A-Z][a-z]+"}
    flaws = ("wrong_capital",)

    def questions(self) -> Iterable[Question]:
        return ({"country": country} for country in CAPITALS)

    def good(self, question: Question) -> str:
        return self._sentence(question, CAPITALS[question["country"]])

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        others = [capital for country, capital in CAPITALS.items() if country != question["country"]]
        return {"wrong_capital": self._sentence(question, pick(rng, others))}

    def find_flaw(self, question: Question, answer: str) -> str | None:
        found = plain(answer).casefold()
        named = {capital for capital in CAPITALS.values() if re.search(rf"\b{capital.casefold()}\b", found)}
        return None if named == {CAPITALS[question["country"]]} else "wrong_capital"

    @staticmethod
    def _sentence(question: Question, capital: str) -> str:
        return f"The capital of {question['country']} is {capital}."


class NextNumber(Family):
    task = "sequence"
    phrasings = (
        "What number comes next: {shown}?",
        "Continue the sequence {shown} with the next number only.",
        "{shown}: which number follows?",
        "Here is a sequence: {shown}. Give the next number.",
        "Fill in the next number after {shown}.",
    )
    fields: ClassVar = {"shown": r"\d+(?:, \d+){3}"}
    flaws = ("wrong_number", "repeats_last")

    def questions(self) -> Iterable[Question]:
        for start, step in product(range(1, 31), range(2, 11)):
            yield {"shown": ", ".join(str(start + i * step) for i in range(4))}

    def good(self, question: Question) -> str:
        *_, before, last = map(int, question["shown"].split(", "))
        return str(2 * last - before)

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        return {
            "wrong_number": str(int(self.good(question)) + pick(rng, (-1, 1))),
            "repeats_last": question["shown"].split(", ")[-1],
        }

    def find_flaw(self, question: Question, answer: str) -> str | None:
        found = re.findall(r"-?\d+", answer)[-1:]
        if found == [self.good(question)]:
            return None
        return "repeats_last" if found == question["shown"].split(", ")[-1:] else "wrong_number"


class Sorting(Family):
    task = "sorting"
    phrasings = (
        "Sort these words alphabetically: {words}.",
        "Put the words {words} in alphabetical order.",
        "Write {words} in the order of the alphabet.",
        "Which order would a dictionary list these words in: {words}?",
        "Arrange from A to Z: {words}.",
    )
    fields: ClassVar = {"words": r"[a-z]+, [a-z]+, [a-z]+"}
    flaws = ("wrong_order", "missing_word")

    def questions(self) -> Iterable[Question]:
        for i, step in product(range(len(WORDS)), (17, 29, 43)):
            words = [WORDS[(i + hop) % len(WORDS)] for hop in (0, step, 2 * step + 1)]
            if words != sorted(words):
                yield {"words": ", ".join(words)}

    def good(self, question: Question) -> str:
        return ", ".join(sorted(question["words"].split(", ")))

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        right = sorted(question["words"].split(", "))
        other_orders = [order for order in permutations(right) if list(order) != right]
        dropped = pick(rng, right)
        return {
            "wrong_order": ", ".join(pick(rng, other_orders)),
            "missing_word": ", ".join(word for word in right if word != dropped),
        }

    def find_flaw(self, question: Question, answer: str) -> str | None:
        right = sorted(question["words"].split(", "))
        found = [word for word in words_of(answer) if word in right]
        if found == right:
            return None
        return "missing_word" if set(found) != set(right) else "wrong_order"


class Plural(Family):
    task = "plural"
    phrasings = (
        'What is the plural of "{noun}"? Reply with one word.',
        'Give the plural form of "{noun}", nothing else.',
        'One "{noun}", two what? Answer with a single word.',
        'Write only the plural of "{noun}".',
        'What do you call more than one "{noun}"? One word, please.',
    )
    fields: ClassVar = {"noun": r"[a-z]+"}
    flaws = ("wrong_plural", "still_singular")

    def questions(self) -> Iterable[Question]:
        return ({"noun": noun} for noun in PLURALS)

    def good(self, question: Question) -> str:
        return PLURALS[question["noun"]]

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        noun = question["noun"]
        regular = noun + "s"
        return {
            "wrong_plural": regular if regular != PLURALS[noun] else noun + "es",
            "still_singular": noun,
        }

    def find_flaw(self, question: Question, answer: str) -> str | None:
        found = plain(answer).casefold()
        if found == self.good(question):
            return None
        return "still_singular" if found == question["noun"] else "wrong_plural"
