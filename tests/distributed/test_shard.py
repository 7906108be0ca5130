"""A sharded policy against one that is whole: the same losses, gradients and update, in two and four processes."""

import json
from collections.abc import Callable

import pytest
import torch

from tvkd_fast.distributed import World, init_distributed, shard_policy

Launch = Callable[..., str]


@pytest.mark.parametrize(
    ("processes", "replicas"),
    [(2, 1), pytest.param(4, 1, marks=pytest.mark.distributed), pytest.param(4, 2, marks=pytest.mark.distributed)],
)
def test_a_step_over_processes_is_the_step_of_one(processes: int, replicas: int, launch: Launch) -> None:
    """Tied and untied Llamas and Gemma 2 with its softcaps, packed rows, one process without a pair of its own."""
    output = launch(processes, "sharded_step.py", str(replicas)).splitlines()
    families = ("llama, tied", "llama, untied", "gemma2")
    assert output == [f"done: {family} {head}" for family in families for head in ("gathered", "shared")]


def test_a_shared_head_in_bfloat16_rounds_as_a_whole_one_does(launch: Launch) -> None:
    """Test targets that nearly all belong to another process: their reference logit must cancel."""
    found = [json.loads(line) for line in launch(2, "rounded_head.py").splitlines()]
    assert len(found) == 5
    for one in found:
        assert one["logps"] < 2e-5, one
        # Its parts are rounded apart, and then summed.
        assert one["dH"] < 2.5 * one["dH whole"], one
        assert one.get("dW", 0.0) < 2 * one.get("dW whole", 1.0), one


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_divergences_over_a_shared_vocabulary_are_those_of_a_whole_one(processes: int, launch: Launch) -> None:
    """Uneven rows and tokens, heads with all transforms, a teacher that is whole and one that is shared, sparse too."""
    found = [json.loads(line) for line in launch(processes, "shared_divergence.py").splitlines()]
    assert len(found) == 6
    for one in found:
        assert one["values"] < 1e-5, one
        assert one["dH"] < 1e-5, one
        assert one["dW"] < 1e-5, one


def test_a_world_of_one_is_nobody_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed(torch.device("cpu")) as world:
        assert world == World(torch.device("cpu"))
        assert world.first
        assert torch.equal(world.all_reduce(torch.ones(2)), torch.ones(2))
        policy = object()
        assert shard_policy(policy, world) is policy  # type: ignore[type-var]


def test_replicas_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(ValueError, match="3 replicas do not divide 4 processes"),
        init_distributed(torch.device("cpu"), replicas=3),
    ):
        pass
