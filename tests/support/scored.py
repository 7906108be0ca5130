"""Fixtures of `tvkd score` over a tiny run's training pairs."""

import pytest

from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.scoring import score_passes
from tvkd_fast.scoring import scorer as scorer_module


@pytest.fixture
def scored(make_config, files):
    """Scores the training pairs into one folder."""

    def make(**changes):
        config = make_config()
        settings = {
            "output_dir": str(files / "scores"),
            "policy": config.policy,
            "teacher": config.teacher,
            "data": config.data,
            "pairs_per_shard": 7,
        }
        return score(ScoreConfig(**(settings | changes)), show_progress=False)

    return make


@pytest.fixture
def computed(monkeypatch):
    """The names of the numbers that were computed, batch by batch."""
    names, of = [], scorer_module.OnlineScorer.of

    def noted(self, batch):
        scores = of(self, batch)
        names.append({name for name, x in vars(scores).items() if x is not None})
        return scores

    monkeypatch.setattr(scorer_module.OnlineScorer, "of", noted)
    return names


@pytest.fixture
def killed_at(monkeypatch):
    """Runs what scores until so many pairs are written, and ends it there as a kill would."""

    def kill(pairs, scoring):
        write = score_passes.ScoreWriter.write

        def killed(self, *shard):
            if self.pairs >= pairs:
                raise KeyboardInterrupt
            write(self, *shard)

        with monkeypatch.context() as patch:
            patch.setattr(score_passes.ScoreWriter, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                scoring()

    return kill
