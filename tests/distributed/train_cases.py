"""The script of a process of `test_train`: recipes, one after the other, in one world. Arguments: their files."""

import sys
from pathlib import Path

import torch

from tvkd_fast.cli.parser import load_recipe
from tvkd_fast.commands.models import of_teacher
from tvkd_fast.commands.score import ScoreConfig, _score
from tvkd_fast.commands.train import _train
from tvkd_fast.distributed import init_distributed


def main() -> None:
    torch.set_num_threads(1)
    with init_distributed(torch.device("cpu"), timeout_s=120) as world:
        for recipe in map(Path, sys.argv[1:]):
            config = load_recipe(str(recipe))
            config.output_dir = str(recipe.with_suffix("") / str(world.size))
            if "replicas" in recipe.stem and world.size == 4:
                config.parallel.replicas = 2
            if config.scores is not None:
                config.scores = f"{config.output_dir}-scores"
                made = {name: getattr(config, name) for name in ("policy", "data")}
                kept = list(of_teacher(config.loss.needs))
                made |= {"teacher": config.teacher, "keep": kept} if kept else {}
                _score(ScoreConfig(output_dir=config.scores, pairs_per_shard=8, **made), world, verbose=False)
                config.teacher = None
            _train(config, world, show_progress=False)
            if world.first:
                print("done:", recipe.stem)


if __name__ == "__main__":
    main()
