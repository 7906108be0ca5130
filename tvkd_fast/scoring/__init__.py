"""The scores of reference and teacher for pairs: from the models themselves, or from a cache on disk."""

from tvkd_fast.scoring.cache import ScoreCache, ScoreWriter, describe
from tvkd_fast.scoring.layout import ScoreLayout, Scores
from tvkd_fast.scoring.manifest import ScoreManifest, read_manifest
from tvkd_fast.scoring.score_passes import score_dataset, score_to_disk
from tvkd_fast.scoring.scorer import CachedScorer, OnlineScorer, Scorer

__all__ = [
    "CachedScorer",
    "OnlineScorer",
    "ScoreCache",
    "ScoreLayout",
    "ScoreManifest",
    "ScoreWriter",
    "Scorer",
    "Scores",
    "describe",
    "read_manifest",
    "score_dataset",
    "score_to_disk",
]
