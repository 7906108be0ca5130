"""The script of a process of `test_checkpoint`: a run that is stopped after some of its steps."""

import os
import signal
import sys
from typing import Any

import torch

from tvkd_fast.cli.parser import load_recipe
from tvkd_fast.commands.train import train
from tvkd_fast.training import trainer
from tvkd_fast.training.signals import Stopped


def main() -> None:
    torch.set_num_threads(1)
    recipe, steps = sys.argv[1], int(sys.argv[2])
    real, taken = trainer.train_step, 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        # One of the processes hears of it, and all of them stop.
        if taken == steps and os.environ["RANK"] == "0":
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **options)

    trainer.train_step = counted  # type: ignore[attr-defined]
    try:
        train(load_recipe(recipe), show_progress=False)
    except Stopped as stopped:
        print(f"\n{stopped} {stopped.status}")


if __name__ == "__main__":
    main()
