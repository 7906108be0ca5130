"""What a process of `test_train` runs: every recipe of a folder, one after the other, in one world."""

import sys
from pathlib import Path

import torch

from tvkd_fast.cli import load_recipe
from tvkd_fast.distributed import joined
from tvkd_fast.training import build


def main() -> None:
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), timeout_s=120) as world:
        for recipe in sorted(Path(sys.argv[1]).glob("*.yaml")):
            config = load_recipe(str(recipe))
            config.output_dir = str(recipe.with_suffix("") / str(world.size))
            build._train(config, world, show_progress=False)
            if world.first:
                print("done:", recipe.stem)


if __name__ == "__main__":
    main()
