"""Responses of a model in this process: one batch of rows at a time, over the model's own key-value cache.

The prompts of a batch are padded on the left, and go through the model once, however many responses are sampled of
each. Rows that have ended leave the batch, and its cache with it.

Letters: R rows of a batch, L tokens of its longest prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tvkd_fast._compat import is_dtensor
from tvkd_fast.models import longest_sequence
from tvkd_fast.models.lent import in_eval
from tvkd_fast.rollout.noise import RaceNoise, noise_key
from tvkd_fast.rollout.samples import Finished, Sample, SamplePrompt
from tvkd_fast.rollout.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_AT_ONCE = 8192
_LEFT_BEHIND = 1 / 8
"""The share of a batch's rows that have ended at which the others go on without them: leaving copies the cache."""


@dataclass
class _Row:
    """One response on its way."""

    prompt: int
    ids: list[int]
    room: int
    key: int
    drawn: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    law_logps: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def over(self) -> bool:
        return self.ended or len(self.drawn) == self.room


class ModelSampler:
    """Samples responses from a causal language model of transformers, as its weights are when it is asked.

    A sample is a function of (seed, step, prompt, its number) and the weights, whatever else is in its batch. Batches
    of other shapes differ by rounding, which tips a draw where the first two of a race are that near to each other
    (docs/sampling.md has how often).

    Args:
        model: in whichever mode: it is put in evaluation mode for a call, which also leaves activation checkpointing
            out, and put back. Its generation config is not read.
        stops: ids at which a response ends, `ResponseEnds.generation_stops`.
        max_length: the most tokens of prompt and response; the model's positions where they are fewer.
        tokens_at_once: the most tokens of a batch's rows, prompts and room for responses: its cache holds as many.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stops: Collection[int],
        *,
        max_length: int | None = None,
        tokens_at_once: int = TOKENS_AT_ONCE,
    ) -> None:
        if any(is_dtensor(parameter) for parameter in model.parameters()):
            raise ValueError(
                "the model's weights are in shards, and a token would gather them all: sample from a whole model"
            )
        self.model, self.stops, self.tokens_at_once = model, frozenset(stops), tokens_at_once
        positions = longest_sequence(model.config)
        self.max_length = positions if max_length is None else min(max_length, positions)
        self._taken = inspect.signature(model.forward).parameters
        self._cache = "cache_params" if "cache_params" in self._taken else "past_key_values"
        self._noise: RaceNoise | None = None

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[SamplePrompt],
        sampling: Sampling,
        *,
        seed: int,
        step: int = 0,
        finished: Finished = lambda samples: None,
    ) -> list[list[Sample]]:
        """`sampling.n` responses to each prompt, in the prompts' order. A response gets `sampling.max_new_tokens`, or
        what `max_length` leaves of them.

        Raises:
            ValueError: a prompt leaves no room for a token, or the family's cache cannot be continued.
            FloatingPointError: a row's logits are not finite.
        """
        rows = [
            _Row(p, prompt.ids, self.room(prompt, sampling), noise_key(seed, step, prompt.ids, prompt.first + i))
            for p, prompt in enumerate(prompts)
            for i in range(sampling.n)
        ]
        with in_eval(self.model):
            for batch in self._batches(rows):
                self._run(batch, sampling)
                finished([_sample(row, sampling) for row in batch])
        found: list[list[Sample]] = [[] for _ in prompts]
        for row in rows:
            found[row.prompt].append(_sample(row, sampling))
        return found

    def room(self, prompt: SamplePrompt, sampling: Sampling) -> int:
        """Tokens that a response to the prompt may have. ValueError where it is none."""
        left = self.max_length - len(prompt.ids)
        if left < 1:
            raise ValueError(
                f"{prompt.row} has {len(prompt.ids):,} tokens, which leaves no room for a response in "
                f"{self.max_length:,}: raise max_length where the model has the positions, or leave such prompts out"
            )
        return min(left, sampling.max_new_tokens)

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Rows of like length together, the longest first, at most `tokens_at_once` or one row."""
        batch: list[_Row] = []
        room = 0
        for row in sorted(rows, key=lambda row: (-len(row.ids), row.prompt)):
            room = max(room, row.room)
            if batch and (len(batch) + 1) * (len(batch[0].ids) + room) > self.tokens_at_once:
                yield batch
                batch, room = [], row.room
            batch.append(row)
        if batch:
            yield batch

    def _run(self, rows: list[_Row], sampling: Sampling) -> None:
        """Draw the rows' responses to their ends."""
        logits, cache, mask, places = self._read(rows)
        live = list(rows)
        while True:
            tokens = self._draw(logits, live, sampling)
            going = [i for i, row in enumerate(live) if not row.over]
            if not going:
                return
            if len(live) - len(going) >= len(live) * _LEFT_BEHIND:
                kept = torch.tensor(going, device=mask.device)
                cache.reorder_cache(kept)
                tokens, mask, places = tokens[kept], mask[kept], places[kept]
                live = [live[i] for i in going]
            mask, places = torch.cat([mask, torch.ones_like(mask[:, :1])], 1), places + 1
            logits = self._logits(self._call(tokens[:, None], mask, places, cache))

    def _read(self, rows: list[_Row]) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Logits [R, V] of the rows' first tokens, their cache, mask [R, L] and last positions [R, 1]; each prompt is
        read once."""
        order = {row.prompt: row.ids for row in rows}
        number = {prompt: i for i, prompt in enumerate(order)}
        device, width = self.model.device, max(map(len, order.values()))
        # Padding is told by its place, never by its id, and no position sees it.
        ids = torch.tensor([[0] * (width - len(x)) + x for x in order.values()], device=device)
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in order.values()], device=device)
        places = (mask.cumsum(1) - 1).clamp_(min=0)
        out = self._call(ids, mask, places, None)
        cache, logits = out.get(self._cache), self._logits(out)
        if not hasattr(cache, "reorder_cache"):
            raise ValueError(
                f"{type(self.model).__name__} returns no cache of keys and values that can be continued: sample from a "
                "model of a family that does, such as Llama, Qwen, Gemma or Mistral"
            )
        of_row = torch.tensor([number[row.prompt] for row in rows], device=device)
        if len(rows) > len(order):
            cache.reorder_cache(of_row)
        return logits[of_row], cache, mask[of_row], places[of_row, -1:]

    def _call(self, ids: Tensor, mask: Tensor, places: Tensor, cache: Any) -> Any:
        given = {"position_ids": places, "logits_to_keep": 1}
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{self._cache: cache},
            **{name: value for name, value in given.items() if name in self._taken},
        )

    def _logits(self, out: Any) -> Tensor:
        """[R, V] at the last place, in float32 at least."""
        logits: Tensor = out.logits[:, -1]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _draw(self, logits: Tensor, rows: list[_Row], sampling: Sampling) -> Tensor:
        """(R,) int64: the next token of each row. Those that are over have one too, which is not theirs."""
        if self._noise is None or self._noise.columns.device != logits.device:
            self._noise = RaceNoise(logits.shape[1], logits.device)
        logps = logits.log_softmax(-1)
        law = sampling.law(logps)
        if sampling.greedy:
            tokens = logits.argmax(-1)
        else:
            position = max(len(row.drawn) for row in rows)
            noise = self._noise.exponentials([row.key for row in rows], position)
            tokens = (law - noise.to(law.dtype).log_()).argmax(-1)
        drawn = [x.gather(1, tokens[:, None])[:, 0].double() for x in (logps, law)]
        # One transfer, and one wait, per token.
        for row, token, logp, law_logp in zip(rows, *torch.stack([tokens.double(), *drawn]).tolist(), strict=True):
            if row.over:
                continue
            if logp != logp:
                raise FloatingPointError(
                    f"the logits of token {len(row.drawn)} of a response are not finite: the weights are not, or "
                    "overflow in their dtype; load the model in float32"
                )
            row.drawn.append(int(token))
            row.logps.append(logp)
            row.law_logps.append(law_logp)
            row.ended = int(token) in self.stops
        return tokens


def _sample(row: _Row, sampling: Sampling) -> Sample:
    bent = bool(sampling.bent) and not sampling.greedy
    return Sample(row.drawn, row.ended, row.logps, row.law_logps if bent else None)
