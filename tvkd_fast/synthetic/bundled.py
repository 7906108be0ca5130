"""A preference set made by code: twelve small tasks whose answers a rule can judge, with no file and no network.

A row's rejected answer has exactly one planted flaw. `judge` reads a prompt back to the question behind it, so that
it scores any answer, also one that a model wrote. The two splits share no question: what a student gets right on
`eval` it did not read in `train`.
"""

import hashlib
import random
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any, Literal, get_args

from tvkd_fast.synthetic.family import Family, Question, pick, question_key
from tvkd_fast.synthetic.tasks import FAMILIES

__all__ = [
    "DEFAULT_ROWS",
    "FAMILIES",
    "Family",
    "Pair",
    "Split",
    "Verdict",
    "judge",
    "max_rows",
    "pairs",
    "preference_rows",
    "rewarded_rows",
]

Split = Literal["train", "eval"]
Message = dict[str, str]

DEFAULT_ROWS: dict[str, int] = {"train": 768, "eval": 192}


@dataclass(frozen=True)
class Verdict:
    """Whether an answer does what its prompt asked; `flaw` names what is wrong, and is None for a good answer."""

    task: str
    good: bool
    flaw: str | None


@dataclass(frozen=True)
class Pair:
    """One prompt with a good answer and one that has the named flaw."""

    task: str
    prompt: str
    chosen: str
    rejected: str
    flaw: str


def pairs(split: Split, n: int | None = None) -> list[Pair]:
    """The first `n` pairs of a split, families in turn; pair i is the same whatever `n` is."""
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; use 'train' or 'eval'")
    if n is None:
        n = DEFAULT_ROWS[split]
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n is {n!r}; pass a whole number of rows, or leave it out for {DEFAULT_ROWS[split]}")
    if n < 1:
        raise ValueError(f"n is {n}; ask for at least 1 row, or leave it out for {DEFAULT_ROWS[split]}")
    if n > (limit := max_rows(split)):
        raise ValueError(
            f"n is {n}, but the bundled set has {limit} different rows in {split!r}; ask for at most {limit}"
        )
    return [_pair(FAMILIES[i % len(FAMILIES)], split, i // len(FAMILIES)) for i in range(n)]


def preference_rows(split: Split, n: int | None = None) -> list[dict[str, Any]]:
    """The first `n` rows of a split in the conversational preference format, with the family's name as `task`."""
    return [
        {
            "prompt": [{"role": "user", "content": pair.prompt}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            "task": pair.task,
        }
        for pair in pairs(split, n)
    ]


def rewarded_rows(split: Split, n: int | None = None) -> list[dict[str, Any]]:
    """`preference_rows` with two rewards of each answer: `score`, the rule's verdict, 1 or 0; and `closeness`, the
    share of its text that it has in common with the good one."""
    return [
        row
        | {"score_chosen": 1.0, "score_rejected": 0.0}
        | {"closeness_chosen": 1.0, "closeness_rejected": SequenceMatcher(None, pair.chosen, pair.rejected).ratio()}
        for row, pair in zip(preference_rows(split, n), pairs(split, n), strict=True)
    ]


def max_rows(split: Split) -> int:
    """Return the number of rows that a split has before a family would repeat a prompt."""
    sizes = [len(_split_questions(family, split)) * len(family.phrasings) for family in FAMILIES]
    return min(size * len(FAMILIES) + turn for turn, size in enumerate(sizes))


def judge(prompt: str | list[Message], answer: str) -> Verdict:
    """Judge any answer to a prompt of this set; of a conversation, the last user message is the prompt.

    Forgiven are white space and quotation marks around the answer, one full stop, accents, a fence around JSON, and
    words around the answer where the prompt does not ask for the answer alone. An answer with nothing in it has the
    flaw "empty"; other flaws are named by the family.
    """
    text = prompt if isinstance(prompt, str) else _last_user_message(prompt)
    for family in FAMILIES:
        if (question := family.parse(text)) is not None:
            flaw = family.find_flaw(question, answer) if answer.strip() else "empty"
            return Verdict(family.task, good=flaw is None, flaw=flaw)
    raise ValueError(f"no rule judges the prompt {text!r}; judge() takes prompts made by preference_rows() only")


def _pair(family: Family, split: Split, turn: int) -> Pair:
    questions = _split_questions(family, split)
    pass_no, position = divmod(turn, len(questions))
    question = questions[position]
    rng = random.Random(f"{split} {family.task} {turn}")
    flaw, rejected = pick(rng, list(family.flawed(question, rng).items()))
    phrasing = family.phrasings[(position + pass_no) % len(family.phrasings)]
    return Pair(family.task, phrasing.format(**question), family.good(question), rejected, flaw)


@cache
def _split_questions(family: Family, split: Split) -> list[Question]:
    """A family's questions in an order drawn by hash: the first fifth is held out for `eval`."""

    def draw(question: Question) -> bytes:
        return hashlib.sha256(f"{family.task} {question_key(question)}".encode()).digest()

    shuffled = sorted(family.questions(), key=draw)
    held_out = len(shuffled) // 5
    return shuffled[:held_out] if split == "eval" else shuffled[held_out:]


def _last_user_message(conversation: list[Message]) -> str:
    for message in reversed(conversation):
        if message.get("role") == "user":
            return message["content"]
    raise ValueError("the prompt has no user message; pass the prompt's text or its list of messages")
