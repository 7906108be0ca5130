"""Preference data, from files to micro-batches, and the scores that teacher and reference leave of it."""

from tvkd_fast.data.batch import PairBatch, collate_pairs, micro_batches
from tvkd_fast.data.dataset import PairDataset, TokenReport, build_dataset, check_token_ids, fingerprint_tokenizer
from tvkd_fast.data.formats import BadPair, Preference, load_preferences
from tvkd_fast.data.order import pairs_of_step
from tvkd_fast.data.scores import ScoreCache, ScoreLayout, ScoreManifest, Scores
from tvkd_fast.data.tokenization import TokenizedPair, tokenize_pair, truncate_pair

__all__ = [
    "BadPair",
    "PairBatch",
    "PairDataset",
    "Preference",
    "ScoreCache",
    "ScoreLayout",
    "ScoreManifest",
    "Scores",
    "TokenReport",
    "TokenizedPair",
    "build_dataset",
    "check_token_ids",
    "collate_pairs",
    "fingerprint_tokenizer",
    "load_preferences",
    "micro_batches",
    "pairs_of_step",
    "tokenize_pair",
    "truncate_pair",
]
