"""The settings of a model over several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tvkd_fast.ranges import POSITIVE, at_least, check_numbers, number

if TYPE_CHECKING:
    pass


@dataclass(kw_only=True)
class ParallelConfig:
    """How processes share a model, where there are several (`--nproc`, or torchrun)."""

    replicas: int = number(1, at_least(1))
    """Groups of processes that hold all weights each, sharded within a group (HSDP); 1 shards over all."""
    vocabulary: Literal["auto", "gathered", "shared"] = "auto"
    """The head: gathered by every process for its own tokens, or shared by rows to which the tokens of all are sent.
    `auto` shares it where those could not be more than the vocabulary."""
    cpu_offload: bool = False
    """Keep shards, gradients and the optimizer in the host's memory."""
    reduce: Literal["step", "micro_batch"] = "step"
    """When gradients are summed over processes: once per step, for which each holds whole gradients from one
    micro-batch to the next, or in each, for which it holds its shards alone."""
    timeout_s: float = number(600.0, POSITIVE)
    """Seconds that a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        check_numbers(self, "parallel")
