"""Where runs were put together: each command has a file in `tvkd_fast.commands` now, and the old names lead there."""

from tvkd_fast._compat import moved

__getattr__ = moved(
    __name__,
    {
        "evaluate_policy": "tvkd_fast.commands.eval",
        "load_dataset": "tvkd_fast.data.data_config",
        "replay": "tvkd_fast.commands.replay",
        "save_final": "tvkd_fast.training.final",
        "score": "tvkd_fast.commands.score",
        "train": "tvkd_fast.commands.train",
    },
)
