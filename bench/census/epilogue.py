"""Instructions of a tile behind its product, counted in SASS: what a multiprocessor does while its tensor cores wait.

From the last tensor instruction of the main loop to the end, by the shortest way through the branches: that of a tile
without a label and without the vocabulary's end, as nearly all tiles are.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PLAIN = {"head_stats": "logps", "dlogits": "plain", "selection_bits": "plain", "exponentials": "plain"}
"""The kernels that exact gradients and values, sparse ones and frozen heads spend their time in, and of each the
variant that stands for it."""
TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")
SCHEDULERS = 4
"""Of a multiprocessor: each issues one instruction of one of its warps a cycle."""
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_TO = re.compile(r"0x([0-9a-f]+)\s*$")
_CONDITION = re.compile(r"^\s*!?U?P\d")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    next: tuple[int, ...]
    """Places of the instructions that may come after it."""


def instructions(sass: str) -> list[Instruction]:
    found = _LINE.findall(sass)
    place = {int(address, 16): i for i, (address, *_) in enumerate(found)}
    made = []
    for i, (_, predicate, opcode, rest) in enumerate(found):
        name = opcode.split(".")[0]
        to = _TO.search(rest) if name == "BRA" else None
        after = [place[int(to[1], 16)]] if to and int(to[1], 16) in place else []
        # A branch may be taken by a predicate before it, or by one that is its first operand.
        passes = name not in ("BRA", "EXIT") or bool(predicate) or bool(_CONDITION.match(rest))
        after += [i + 1] * (passes and i + 1 < len(found))
        made.append(Instruction(name, tuple(after)))
    return made


def main_loop(code: list[Instruction]) -> tuple[int, int] | None:
    """First and last place of the shortest loop that holds a tensor instruction; None where there is none."""
    tensor = [i for i, x in enumerate(code) if x.opcode in TENSOR]
    loops = [(to, i) for i, x in enumerate(code) for to in x.next if to <= i and any(to <= k <= i for k in tensor)]
    return min(loops, key=lambda loop: loop[1] - loop[0], default=None)


def epilogue(sass: str) -> int:
    """Instructions of a warp from the main loop's end to the program's, by the shortest way; 0 without such a loop."""
    code = instructions(sass)
    loop = main_loop(code)
    if loop is None:
        return 0
    first, last = loop
    least, waiting = {last: 0}, [(0, last)]
    while waiting:
        length, i = heapq.heappop(waiting)
        if code[i].opcode == "EXIT":
            return length
        for to in code[i].next:
            if not first <= to <= last and length + 1 < least.get(to, len(code) + 1):
                least[to] = length + 1
                heapq.heappush(waiting, (length + 1, to))
    return 0


def plain_rows(census: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a census of those variants in bf16."""
    for row in census["rows"]:
        build = row["build"]
        if build["dtype"] == "bf16" and PLAIN.get(build["kernel"]) == build["variant"]:
            yield row


def issue_cycles(count: int, warps: int) -> int:
    """Cycles that the schedulers need to issue so many instructions of each of a program's warps."""
    return count * -(-warps // SCHEDULERS)
