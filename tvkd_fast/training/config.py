"""Where configs were: each lies beside its owner now, and the old names lead there."""

from tvkd_fast._compat import moved

__getattr__ = moved(
    __name__,
    {
        "DataConfig": "tvkd_fast.data.data_config",
        "EvalConfig": "tvkd_fast.commands.eval",
        "ExplainConfig": "tvkd_fast.commands.explain",
        "LoraConfig": "tvkd_fast.models.settings",
        "ModelConfig": "tvkd_fast.models.settings",
        "OptimConfig": "tvkd_fast.training.optim",
        "ParallelConfig": "tvkd_fast.distributed.parallel_config",
        "ScoreConfig": "tvkd_fast.commands.score",
        "TrainConfig": "tvkd_fast.training.train_config",
    },
)
