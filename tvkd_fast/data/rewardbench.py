"""RewardBench: preference pairs in subsets, and subsets in sections with weights of their own.

Columns, sections, weights and the rule for ties are those of Lambert et al., 2024 (arXiv 2403.13787), and of the
constants in its code (github.com/allenai/reward-bench).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tvkd_fast.data.formats import BadPair, Preference, to_preference

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


def to_rewardbench(record: Mapping[str, Any], row: str) -> Preference:
    """One row of columns `prompt, chosen, rejected, subset` as a conversation: the prompt is the user's turn.

    Raises:
        BadPair: a column is missing or empty, or `to_preference` refuses what is in it.
    """
    missing = [name for name in ("prompt", "chosen", "rejected", "subset") if not record.get(name)]
    if missing:
        raise BadPair(row, "no row of RewardBench", f"without {', '.join(missing)}", "Leave out --format rewardbench")
    prompt = record["prompt"]
    turns = {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
    turns |= {name: [{"role": "assistant", "content": record[name]}] for name in ("chosen", "rejected")}
    return replace(to_preference(turns, row), subset=str(record["subset"]))


def section_weights(subsets: set[str]) -> dict[str, dict[str, float]]:
    """Of each section that has any of these subsets: each subset's share of its score, of 1 together."""
    found = {}
    for section, weights in SECTIONS.items():
        present = {name: weight for name, weight in weights.items() if name in subsets}
        if present:
            total = sum(present.values())
            found[section] = {name: weight / total for name, weight in present.items()}
    return found
