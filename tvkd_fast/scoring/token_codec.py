"""How what is kept of each response token is coded on disk, and decoded for a batch.

Letters: N response tokens of a batch or a shard, D hidden, V vocabulary, k entries that are kept of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tvkd_fast.scoring.kinds import count_of, kind_of
from tvkd_fast.scoring.layout import Scores
from tvkd_fast.scoring.rotation import Rotation

StatesDtype = Literal["int8", "bfloat16"]
Rows = Mapping[str, Tensor]
"""Tensors by name, of one row per token each."""
_LEVELS = 127
_BLOCK = 256
"""Tokens between two places of a file of draws that are held in memory: one for each would be eight bytes a token."""


class Codec(Protocol):
    """One kind: rows of a batch to rows for a file, and back."""

    def encode(self, scores: Scores) -> Rows:
        """The rows of a batch's scores, in the dtypes of the file."""

    def packed(self, rows: Rows) -> Rows:
        """What a file holds of rows; it may leave out what is empty in them."""

    def opened(self, packed: Rows) -> Rows:
        """What is to be known of a file to find rows in it."""

    def rows(self, opened: Rows, start: int, end: int) -> Rows:
        """Rows start..end−1 of a file."""

    def decode(self, rows: Rows) -> dict[str, Tensor]:
        """The tensors of `Scores`, by name, in float32 and int64."""


class Plain:
    """Of rows that lie in a file as they are."""

    def packed(self, rows: Rows) -> Rows:
        return rows

    def opened(self, packed: Rows) -> Rows:
        return packed

    def rows(self, opened: Rows, start: int, end: int) -> Rows:
        return {name: x[start:end] for name, x in opened.items()}


@dataclass(frozen=True)
class StateCodec(Plain):
    """States in bfloat16, or rotated and in int8: x ≈ c·s, integers c in ±127 and s = max|x|/127 of each row."""

    dtype: StatesDtype
    rotation: Rotation | None = None
    """Of int8; a reader needs none, since the head that is kept beside is rotated as well."""

    def encode(self, scores: Scores) -> Rows:
        hidden = scores.teacher_hidden
        assert hidden is not None
        if not bool(hidden.isfinite().all()):
            raise ValueError("the teacher has states that are not finite, of which nothing can be kept")
        if self.dtype == "bfloat16":
            return {"states": hidden.bfloat16()}
        assert self.rotation is not None
        rotated = self.rotation.of(hidden.float())
        scales = rotated.abs().amax(1) / _LEVELS
        codes = (rotated / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
        return {"states": codes.clamp_(-_LEVELS, _LEVELS).to(torch.int8), "scales": scales}

    def decode(self, rows: Rows) -> dict[str, Tensor]:
        states = rows["states"].float()
        return {"teacher_hidden": states if self.dtype == "bfloat16" else states.mul_(rows["scales"][:, None])}


@dataclass(frozen=True)
class TopKCodec(Plain):
    """Ids, log-probabilities in float16, and the tail's mass, to which they are normalised again."""

    vocab_size: int

    def encode(self, scores: Scores) -> Rows:
        assert scores.topk_ids is not None
        assert scores.topk_logps is not None
        tail = 1.0 - scores.topk_logps.double().exp().sum(1)
        ids = _narrow(scores.topk_ids, self.vocab_size)
        return {"ids": ids, "logps": scores.topk_logps.half(), "tail": tail.clamp_(0.0, 1.0).float()}

    def decode(self, rows: Rows) -> dict[str, Tensor]:
        logps = rows["logps"].float()
        logps += ((-rows["tail"]).log1p() - logps.logsumexp(1))[:, None]
        return {"topk_ids": _wide(rows["ids"]), "topk_logps": logps}


@dataclass(frozen=True)
class SampledCodec:
    """The distinct ids of k draws and how often each was drawn, those of all tokens behind each other."""

    vocab_size: int
    draws: int

    def encode(self, scores: Scores) -> Rows:
        assert scores.sampled_ids is not None
        assert scores.sampled_shares is not None
        counts = (scores.sampled_shares * self.draws).round_().to(torch.uint8)
        return {"ids": _narrow(scores.sampled_ids, self.vocab_size), "counts": counts}

    def packed(self, rows: Rows) -> Rows:
        drawn = rows["counts"] > 0
        found = {name: x[drawn] for name, x in rows.items()}
        return found | {"distinct": drawn.sum(1).to(torch.uint8)}

    def opened(self, packed: Rows) -> Rows:
        distinct = packed["distinct"].flatten()
        of_blocks = torch.nn.functional.pad(distinct, (0, -len(distinct) % _BLOCK)).view(-1, _BLOCK).sum(1)
        return {**packed, "firsts": torch.nn.functional.pad(of_blocks.cumsum(0), (1, 0))}

    def rows(self, opened: Rows, start: int, end: int) -> Rows:
        block, distinct = start // _BLOCK, opened["distinct"][start:end].long()
        first = int(opened["firsts"][block] + opened["distinct"][block * _BLOCK : start].sum())
        last = first + int(distinct.sum())
        places = torch.arange(self.draws).expand(len(distinct), -1)
        drawn = places < distinct[:, None]
        return {
            name: torch.zeros(drawn.shape, dtype=opened[name].dtype).masked_scatter_(drawn, opened[name][first:last])
            for name in ("ids", "counts")
        }

    def decode(self, rows: Rows) -> dict[str, Tensor]:
        drawn = rows["counts"] > 0
        most = int(drawn.sum(1).max()) if len(drawn) else 0
        ids = _wide(rows["ids"]).masked_fill_(~drawn, -1)
        return {"sampled_ids": ids[:, :most], "sampled_shares": rows["counts"][:, :most].float() / self.draws}


def codec_of(name: str, states_dtype: StatesDtype | None, vocab_size: int, rotation: Rotation | None = None) -> Codec:
    """The codec of a kind by its name; the vocabulary's size and the rotation matter to a writer alone."""
    kind = kind_of(name)
    if kind == "states":
        assert states_dtype is not None
        return StateCodec(states_dtype, rotation)
    return TopKCodec(vocab_size) if kind == "topk" else SampledCodec(vocab_size, count_of(name))


def _narrow(ids: Tensor, vocab_size: int) -> Tensor:
    """In 16 bits where they fit, without a sign: torch computes with int16 and hardly with uint16."""
    return ids.to(torch.int16 if vocab_size <= 2**16 else torch.int32)


def _wide(ids: Tensor) -> Tensor:
    return ids.long() & 0xFFFF if ids.dtype == torch.int16 else ids.long()
