"""RewardBench: preference pairs in subsets, and subsets in sections with weights of their own.

Columns, sections, weights and the rule for ties are those of Lambert et al., 2024 (arXiv 2403.13787), and of the
constants in its code (github.com/allenai/reward-bench). RewardBench 2 (Malik et al., 2025, arXiv 2506.01937) has lists
of answers: a row is right where each of the chosen ones scores higher than each of the rejected ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tvkd_fast.data.reading.formats import BadPair, Preference, to_preference
from tvkd_fast.data.reading.messages import is_list

HUB, SPLIT = "allenai/reward-bench", "filtered"
"""The set on the hub, and which of its splits the benchmark is."""

SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        # Of 447 pairs: weighted as if they were as many as those of code.
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""Weight of each subset in its section's score; the benchmark's score is the mean of the sections."""


def to_rewardbench(record: Mapping[str, Any], row: str) -> Preference | list[Preference]:
    """Read one row of columns `prompt, chosen, rejected, subset` as a conversation: the prompt is the user's turn.

    Lists of answers, as RewardBench 2 has them, become as many pairs as the longer list is long: each answer is in one.

    Raises:
        BadPair: a column is missing or empty, an answer is on both sides, `num_correct` or `num_incorrect` is not how
            many there are, or `to_preference` refuses what is in them.
    """
    missing = [name for name in ("prompt", "chosen", "rejected", "subset") if not record.get(name)]
    if missing:
        raise BadPair(row, "no row of RewardBench", f"without {', '.join(missing)}", "Leave out --format rewardbench")
    chosen, rejected = _answers(record, "chosen", row), _answers(record, "rejected", row)
    for count, answers in (("num_correct", chosen), ("num_incorrect", rejected)):
        if record.get(count) not in (None, len(answers)):
            raise BadPair(
                row, "another number of answers", f"{count} is {record[count]!r}, and there are {len(answers)}"
            )
    if not {*chosen}.isdisjoint(rejected):
        raise BadPair(row, "chosen equals rejected")
    if isinstance(record["chosen"], str) and isinstance(record["rejected"], str):
        return _pair(record, chosen[0], rejected[0], row)
    longer = range(max(len(chosen), len(rejected)))
    return [_pair(record, chosen[i % len(chosen)], rejected[i % len(rejected)], row) for i in longer]


def _answers(record: Mapping[str, Any], name: str, row: str) -> list[str]:
    answers = [record[name]] if isinstance(record[name], str) else record[name]
    if not is_list(answers) or not all(isinstance(answer, str) for answer in answers):
        raise BadPair(row, "wrong type", f"{name} must be a string or a list of strings")
    return list(answers)


def _pair(record: Mapping[str, Any], chosen: str, rejected: str, row: str) -> Preference:
    prompt = record["prompt"]
    turns = {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
    turns |= {
        name: [{"role": "assistant", "content": answer}]
        for name, answer in (("chosen", chosen), ("rejected", rejected))
    }
    return replace(to_preference({**record, **turns}, row), subset=str(record["subset"]))


def section_weights(subsets: set[str]) -> dict[str, dict[str, float]]:
    """Return each subset's share of its section's score, for each section that has any of these subsets."""
    found = {}
    for section, weights in SECTIONS.items():
        present = {name: weight for name, weight in weights.items() if name in subsets}
        if present:
            total = sum(present.values())
            found[section] = {name: weight / total for name, weight in present.items()}
    return found
