"""The bytes that a step sends over gloo, by torch's flight recorder and by the planner. Arguments: recipes."""

import json
import math
import sys

import torch
import torch._C._distributed_c10d as c10d

from tvkd_fast.cli.parser import load_recipe
from tvkd_fast.commands.plan import tokens_of
from tvkd_fast.commands.prepare import prepare
from tvkd_fast.data import PairBatch
from tvkd_fast.distributed import World, init_distributed
from tvkd_fast.models import model_shape
from tvkd_fast.planning.footprint import Footprint
from tvkd_fast.scoring.layout import Scores
from tvkd_fast.training.trainer import Trainer

SCALARS = 64
"""Bytes of what is no tensor of weights: losses, and norms, if they have a shape at all."""


def main() -> None:
    torch.set_num_threads(1)
    configs = [load_recipe(recipe) for recipe in sys.argv[1:]]
    (replicas,) = {config.parallel.replicas for config in configs}
    with init_distributed(torch.device("cpu"), replicas=replicas, timeout_s=120) as world:
        for config in configs:
            made = prepare(config, world, verbose=False)
            trainer = Trainer(config, made.policy, made.scorer, made.dataset, show_progress=False, world=world)
            sent: dict[str, float] = {}
            # A first step learns what goes where.
            for step in range(2):
                batches = trainer._batches(step)
                # The reference's numbers come first; it is gathered too, and only the policy's traffic is counted.
                trainer.scorer = _Known([made.scorer.of(batch) for batch in batches])
                before = len(_entries())
                trainer._step(step, batches)
            sent = _sent(_entries()[before:], world, replicas)
            found = Footprint(config, model_shape(config.policy), None, tokens_of(made.dataset), world.size)
            counted = found.communication()
            if world.first:
                print(json.dumps({"sent": sent, "counted": counted, "micro_batches": len(trainer._batches(1))}))


class _Known:
    def __init__(self, scores: list[Scores]) -> None:
        self.scores = iter(scores)

    def of(self, batch: PairBatch) -> Scores:
        return next(self.scores)


def _sent(entries: list[dict], world: World, replicas: int) -> dict[str, float]:
    """Bytes of weights gathered, gradients reduced, states of tokens either way, and gradients of replicas."""
    sent = {"gathered": 0.0, "reduced": 0.0, "states": 0.0, "replicas": 0.0}
    assert world.mesh is not None
    ring, among = 1 - replicas / world.size, 1 - 1 / replicas
    over_replicas = world.mesh.get_group(0).group_name if replicas > 1 else None
    floats = [entry for entry in entries if entry["input_dtypes"][:1] == ["Float"]]
    # FSDP2 sends flat tensors; rows of states are a shared vocabulary's, which also sends a number for each.
    apart = [entry for entry in floats if entry["process_group"][0] == over_replicas]
    sent["replicas"] = 2 * among * sum(size for entry in apart if (size := _bytes(entry, "input")) > SCALARS)
    floats = [entry for entry in floats if entry not in apart]
    rows = {entry["input_sizes"][0][0] for entry in floats if len(entry["input_sizes"][0]) == 2}
    for entry in floats:
        gathers, given = "gather" in entry["profiling_name"], entry["input_sizes"][0]
        # gloo reduces all of it, and scatters it afterwards.
        size = ring * _bytes(entry, "output" if gathers else "input")
        if len(given) == 2:
            sent["states"] += size
        elif len(given) == 1 and given[0] not in rows and size > SCALARS:
            sent["gathered" if gathers else "reduced"] += size
    return sent


def _entries() -> list[dict]:
    return json.loads(c10d._dump_fr_trace_json())["entries"]  # type: ignore[attr-defined]


def _bytes(entry: dict, side: str) -> float:
    return 4.0 * sum(math.prod(size) for size in entry[f"{side}_sizes"])


if __name__ == "__main__":
    main()
