"""A sharded policy against one that is whole: the same losses, gradients and update, in two and four processes."""

from collections.abc import Callable

import pytest
import torch

from tvkd_fast.distributed import World, joined, shard_policy

pytestmark = pytest.mark.distributed
Launch = Callable[..., str]


@pytest.mark.parametrize(("processes", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_a_step_over_processes_is_the_step_of_one(processes: int, replicas: int, launch: Launch) -> None:
    """Tied and untied Llamas and Gemma 2 with its softcaps, packed rows, one process without a pair of its own."""
    said = launch(processes, "sharded_step.py", str(replicas)).splitlines()
    families = ("llama, tied", "llama, untied", "gemma2")
    assert said == [f"done: {family} {head}" for family in families for head in ("gathered", "shared")]


def test_a_world_of_one_is_nobody_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(torch.device("cpu")) as world:
        assert world == World(torch.device("cpu"))
        assert world.first
        assert torch.equal(world.sum(torch.ones(2)), torch.ones(2))
        policy = object()
        assert shard_policy(policy, world) is policy


def test_replicas_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(ValueError, match="3 replicas do not divide 4 processes"),
        joined(torch.device("cpu"), replicas=3),
    ):
        pass
