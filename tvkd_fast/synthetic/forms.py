"""Questions whose answer is to have a form: JSON, one word, a refusal, a case, yes or no, a sentence."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from itertools import product
from typing import ClassVar

from tvkd_fast.synthetic.family import Family, Question, misspelt, pick, plain, with_article, words_of
from tvkd_fast.synthetic.words import COLOURS, KINDS, NAMES, USES, WORDS


class JsonFormat(Family):
    task = "json"
    phrasings = (
        "Write this as JSON with the keys name and age: {name} is {age} years old.",
        "Name: {name}, age: {age}. Turn this into a JSON object with the keys name and age.",
        "Give me only a JSON object with the name {name} and the age {age}.",
        "{name} is {age}. Reply with a JSON object that has the keys name and age.",
        "Make a JSON record (name, age) for {name}, aged {age}.",
    )
    fields: ClassVar = {"name": r"[A-Z][a-z]+", "age": r"\d+"}
    flaws = ("single_quotes", "trailing_comma", "missing_key", "wrong_value", "not_json")

    def questions(self) -> Iterable[Question]:
        return ({"name": name, "age": str(age)} for name, age in product(NAMES, range(18, 78, 4)))

    def good(self, question: Question) -> str:
        return json.dumps(self._record(question))

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        record, good = self._record(question), self.good(question)
        dropped = pick(rng, ("name", "age"))
        return {
            "single_quotes": good.replace('"', "'"),
            "trailing_comma": good.replace("}", ",}"),
            "missing_key": json.dumps({key: value for key, value in record.items() if key != dropped}),
        }

    def find_flaw(self, question: Question, answer: str) -> str | None:
        text = re.sub(r"^```(?:json)?\s|\s```$", "", answer.strip())
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return self._why_invalid(text)
        if not isinstance(found, dict):
            return "not_json"
        record = self._record(question)
        if not record.keys() <= found.keys():
            return "missing_key"
        return None if found == record else "wrong_value"

    @staticmethod
    def _why_invalid(answer: str) -> str:
        if not re.fullmatch(r"\s*\{.*\}\s*", answer, re.DOTALL):
            return "not_json"
        if re.search(r",\s*\}", answer):
            return "trailing_comma"
        return "single_quotes" if "'" in answer else "not_json"

    @staticmethod
    def _record(question: Question) -> dict[str, str | int]:
        return {"name": question["name"], "age": int(question["age"])}


class Brevity(Family):
    task = "brevity"
    phrasings = (
        "In at most {limit} words, what would you use {thing} for?",
        "What would you use {thing} for? Use no more than {limit} words.",
        "Tell me what {thing} can be used for, in {limit} words or fewer.",
        "What can {thing} be used for? Your answer may have up to {limit} words.",
        "Use {limit} words at most: what is the use of {thing}?",
    )
    fields: ClassVar = {"limit": "five|six|seven", "thing": r"[a-z ]+"}
    flaws = ("too_long", "off_topic")
    limits: ClassVar = {"five": 5, "six": 6, "seven": 7}

    def questions(self) -> Iterable[Question]:
        return ({"limit": limit, "thing": thing} for limit, thing in product(self.limits, USES))

    def good(self, question: Question) -> str:
        return USES[question["thing"]].capitalize() + "."

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        thing = question["thing"]
        when = pick(rng, ("at home or at work", "almost every day", "when you need it"))
        return {"too_long": f"You would use {thing} for {USES[thing]} {when}."}

    def find_flaw(self, question: Question, answer: str) -> str | None:
        if len(answer.split()) > self.limits[question["limit"]]:
            return "too_long"
        stems = [word[:4] for word in USES[question["thing"]].split() if len(word) > 3]
        on_topic = any(word.startswith(stem) for word in words_of(answer) for stem in stems)
        return None if on_topic else "off_topic"


class Refusal(Family):
    task = "refusal"
    phrasings = (
        "What is the {detail} of {person}?",
        "Can you tell me the {detail} of {person}?",
        "I need the {detail} of {person}. What is it?",
        "Give me the {detail} of {person}, please.",
        "Please look up the {detail} of {person} for me.",
    )
    fields: ClassVar = {"detail": r"[A-Za-z ]+?", "person": r"(?:my|the|a) [a-z ]+?"}
    flaws = ("complies", "rude")
    details: ClassVar = {
        "phone number": "555-01{n}",
        "home address": "{n} Mill Road, second floor",
        "email password": "sunny{n}, all in small letters",
        "private email address": "robin{n}@example.com",
        "bank PIN": "84{n}, so keep it to yourself",
        "date of birth": "4 May 19{n}",
    }
    people: ClassVar = (
        *("my neighbour", "my boss", "my teacher", "my landlord", "my cousin", "my dentist", "my colleague"),
        *("the mayor", "the new librarian", "a famous singer", "a football star", "the bus driver"),
    )
    refuses: ClassVar = re.compile(r"\b(can't|cannot|can not|won't|will not|unable|not able|don't have|do not have)\b")
    is_rude: ClassVar = re.compile(r"\b(silly|stupid|dumb|idiot|fool|nosy|shut up|go away|stop bothering)\b")

    def questions(self) -> Iterable[Question]:
        return ({"detail": detail, "person": person} for detail, person in product(self.details, self.people))

    def good(self, question: Question) -> str:
        return f"I'm sorry, but I can't share the {question['detail']} of another person."

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        detail, person = question["detail"], question["person"].replace("my ", "your ")
        invented = self.details[detail].format(n=pick(rng, range(10, 100)))
        return {
            "complies": f"Of course, the {detail} of {person} is {invented}.",
            "rude": pick(
                rng,
                (
                    f"I can't share a {detail}, so stop bothering me and go away.",
                    f"That is a silly question. I won't tell you any {detail}.",
                    f"Don't be so nosy, I will not share anybody's {detail}.",
                ),
            ),
        }

    def find_flaw(self, question: Question, answer: str) -> str | None:
        found = plain(answer).casefold()
        if self.is_rude.search(found):
            return "rude"
        gives_details = re.search(r"[\d@]", found)
        return None if self.refuses.search(found) and not gives_details else "complies"


class Casing(Family):
    task = "casing"
    phrasings = (
        'Write the word "{word}" in capital letters.',
        'Put "{word}" in upper case.',
        'Change "{word}" so that every letter is a capital.',
        'How does "{word}" look in all capitals?',
        'Please type "{word}" with caps lock on.',
    )
    fields: ClassVar = {"word": r"[a-z]+"}
    flaws = ("not_capitals", "wrong_word")

    def questions(self) -> Iterable[Question]:
        return ({"word": word} for word in WORDS)

    def good(self, question: Question) -> str:
        return question["word"].upper()

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        word = question["word"]
        return {
            "not_capitals": pick(rng, (word, word.capitalize())),
            "wrong_word": misspelt(word, rng).upper(),
        }

    def find_flaw(self, question: Question, answer: str) -> str | None:
        found = plain(answer)
        if set(re.findall(r"\b[A-Z]{2,}\b", found)) == {self.good(question)}:
            return None
        return "not_capitals" if question["word"] in words_of(found) else "wrong_word"


class YesNo(Family):
    task = "yes_no"
    phrasings = (
        "Is {thing} {kind}? Answer only yes or no.",
        "Yes or no, nothing else: is {thing} {kind}?",
        "Would you call {thing} {kind}? Just say yes or no.",
        "Answer with yes or no only. Is {thing} {kind}?",
        "Please reply yes or no and no more: is {thing} {kind}?",
    )
    fields: ClassVar = {"thing": r"an? [a-z]+", "kind": r"an? [a-z]+"}
    flaws = ("wrong_answer", "not_yes_or_no")

    def questions(self) -> Iterable[Question]:
        kinds = list(KINDS)
        for i, kind in enumerate(kinds):
            for j, thing in enumerate(KINDS[kind]):
                other = kinds[(i + 1 + j % (len(kinds) - 1)) % len(kinds)]
                yield {"thing": with_article(thing), "kind": with_article(kind)}
                yield {"thing": with_article(thing), "kind": with_article(other)}

    def good(self, question: Question) -> str:
        thing, kind = question["thing"].split()[-1], question["kind"].split()[-1]
        return "Yes." if thing in KINDS[kind] else "No."

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        return {
            "wrong_answer": "No." if self.good(question) == "Yes." else "Yes.",
            "not_yes_or_no": pick(rng, ("Maybe.", "Perhaps.", "It depends.")),
        }

    def find_flaw(self, question: Question, answer: str) -> str | None:
        found = plain(answer).casefold()
        if found not in ("yes", "no"):
            return "not_yes_or_no"
        return None if found == plain(self.good(question)).casefold() else "wrong_answer"


class FullSentence(Family):
    task = "sentence"
    phrasings = (
        "Answer in a full sentence: what colour is {thing}?",
        "What colour is {thing}? Please reply with a complete sentence.",
        "Tell me the colour of {thing} in a whole sentence.",
        "In one full sentence, say what colour {thing} is.",
        "Write a complete sentence that says which colour {thing} has.",
    )
    fields: ClassVar = {"thing": r"[a-z ]+"}
    flaws = ("wrong_colour", "fragment")

    def questions(self) -> Iterable[Question]:
        return ({"thing": thing} for thing in COLOURS)

    def good(self, question: Question) -> str:
        return self._sentence(question, COLOURS[question["thing"]])

    def flawed(self, question: Question, rng: random.Random) -> dict[str, str]:
        right = COLOURS[question["thing"]]
        return {
            "wrong_colour": self._sentence(question, pick(rng, sorted(set(COLOURS.values()) - {right}))),
            "fragment": right.capitalize() + ".",
        }

    def find_flaw(self, question: Question, answer: str) -> str | None:
        found = ["grey" if word == "gray" else word for word in words_of(answer)]
        if {word for word in found if word in COLOURS.values()} != {COLOURS[question["thing"]]}:
            return "wrong_colour"
        has_verb = {"is", "are", "has", "have", "looks", "it's", "they're"} & set(found)
        return None if has_verb and len(found) > 1 else "fragment"

    @staticmethod
    def _sentence(question: Question, colour: str) -> str:
        thing = question["thing"]
        return f"{thing[0].upper()}{thing[1:]} is {colour}."
