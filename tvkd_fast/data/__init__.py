"""Preference data, from files to micro-batches."""

from tvkd_fast.data.batch import Layout, PairBatch, collate_pairs, micro_batches
from tvkd_fast.data.dataset import (
    PairDataset,
    TokenReport,
    build_dataset,
    check_positions,
    check_token_ids,
)
from tvkd_fast.data.order import pairs_of_epochs, pairs_of_step
from tvkd_fast.data.packing import MicroBatching, Packing, collate_packed, first_fit, packed_length
from tvkd_fast.data.reading.formats import BadPair, Preference, load_preferences
from tvkd_fast.data.retokenize import retokenize
from tvkd_fast.data.tokenization import TokenizedPair, tokenize_pair, truncate_pair
from tvkd_fast.data.tokenizer_fingerprint import fingerprint_tokenizer

__all__ = [
    "BadPair",
    "Layout",
    "MicroBatching",
    "Packing",
    "PairBatch",
    "PairDataset",
    "Preference",
    "TokenReport",
    "TokenizedPair",
    "build_dataset",
    "check_positions",
    "check_token_ids",
    "collate_packed",
    "collate_pairs",
    "fingerprint_tokenizer",
    "first_fit",
    "load_preferences",
    "micro_batches",
    "packed_length",
    "pairs_of_epochs",
    "pairs_of_step",
    "retokenize",
    "tokenize_pair",
    "truncate_pair",
]
