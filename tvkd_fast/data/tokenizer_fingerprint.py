"""The identity of a tokenizer: what decides its ids."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of what decides a tokenizer's ids: vocabulary, special tokens, chat template, and for fast
    tokenizers the whole pipeline with its merges. Its name, path and padding or truncation state leave it unchanged.
    """
    content: dict[str, object] = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "special_tokens": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        content["pipeline"] = {key: pipeline[key] for key in pipeline if key not in ("truncation", "padding")}
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
