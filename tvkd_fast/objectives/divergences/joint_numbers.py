"""Numbers of a policy and frozen models over one vocabulary, from as few walks as what is asked for allows.

Letters: N response tokens, D hidden of each model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tvkd_fast.fused.known_joint import known_joint
from tvkd_fast.ops import Head, Upstream, linear_expected_score, linear_joint, linear_sparse_divergence
from tvkd_fast.ops.joint.top_gap import linear_top_gap

if TYPE_CHECKING:
    from tvkd_fast.data import PairBatch
    from tvkd_fast.models import FusedLMHead

LOGPS = "logps"
SCORE = "score"
TOP_GAP = "top_gap"
KEPT = ("topk", "sampled")
"""Outputs that compare with what is kept of the teacher's distribution, by the prefix of it in `Scores`."""
_ALONE = (SCORE, TOP_GAP, *KEPT)
"""Outputs of walks of their own."""
Whose = Literal["teacher", "ref", "base"]
"""The frozen models, by the prefix of their states and head in `Scores`."""
Factored = tuple[tuple[float, Whose], ...]
"""Models and what their logits, or log-probabilities, are multiplied by."""
TEACHER: Factored = ((1.0, "teacher"),)
REFERENCE: Factored = ((1.0, "ref"),)


@dataclass(frozen=True)
class Joint:
    """A number of every response token under the policy p and another distribution q, nats.

    `output` is a divergence of `linear_joint`; "score", E_p[Σ c·log q]; "top_gap", `linear_top_gap`; or forward KL to
    the teacher's "topk", the tail spread evenly, or to its "sampled" tokens, at temperature 1. `of` are factors c and
    the models: with several, a divergence is to softmax(Σ c·z). Outputs that share all but their names come from one
    walk.
    """

    output: str
    of: Factored = TEACHER
    beta: float = 0.5
    """The teacher's share of m, in "jsd" and the skew KLs."""
    temperature: float = 1.0
    """τ > 0, by which all logits are divided."""
    responses: Literal["both", "chosen", "rejected"] = "both"
    """The responses that are computed; in the others it is 0, and costs nothing on a CPU."""
    clip: tuple[float, float] | None = None
    """Limits of every vocabulary entry's Σ c·log q, in a score."""

    @property
    def walk(self) -> Joint:
        """What outputs of one walk have in common; those that have walks of their own are their own."""
        return self if self.is_alone else replace(self, output="")

    @property
    def is_alone(self) -> bool:
        """Whether it is no output of `linear_joint`."""
        return self.output in _ALONE


@dataclass(frozen=True)
class Distributions:
    """A batch's frozen distributions: states [N, D'] at the response tokens and heads, by model."""

    of: Mapping[Whose, tuple[Tensor, Head]]
    kept: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """[N, k] ids and probabilities of what is kept of the teacher's, by the names in `KEPT`."""

    def one(self, factors: Factored) -> tuple[Tensor, Head]:
        """States and head whose logits are Σ c·z: those of the only model, or of all side by side.

        Raises ValueError where a model's softcap makes its logits no product.
        """
        if len(factors) == 1 and factors[0][0] == 1.0:
            return self.of[factors[0][1]]
        found = [(c, *self.of[whose]) for c, whose in factors]
        if any(head.softcap is not None for _, _, head in found):
            raise ValueError(
                "a sum of two models' logits takes heads without a softcap, and a model here has one: choose a family "
                "without, or an objective over one model"
            )
        size = min(head.vocab_size for _, _, head in found)
        heads = [head.columns(0, size) for _, _, head in found]
        states = [c * head.logit_scale * h for (c, h, _), head in zip(found, heads, strict=True)]
        biases = [
            c * head.logit_scale * head.bias
            for (c, _, _), head in zip(found, heads, strict=True)
            if head.bias is not None
        ]
        bias = sum(biases[1:], start=biases[0]) if biases else None
        return torch.cat(states, 1), Head(torch.cat([head.weight for head in heads], 1), bias)


@dataclass(frozen=True)
class KnownUpstream:
    """What the loss is known to hand down to the numbers: nothing where they are not known."""

    joint: Mapping[Joint, Tensor] = field(default_factory=dict)
    """(N,) of a key, constants."""
    logps: Tensor | None = None
    """(2P,) of responses' log-probabilities, constants."""
    pairwise: Upstream | None = None
    """Of log-probabilities, where it follows from a pair's own and from nothing else that is asked for here."""

    def per_token(self, batch: PairBatch) -> Tensor:
        """(N,) of every token's log-probability."""
        assert self.logps is not None
        return self.logps.repeat_interleave(batch.lengths, output_size=len(batch.labels))

    def of_logps(self, batch: PairBatch) -> Upstream | None:
        """The same for a head by itself."""
        constants = self.logps
        if constants is None:
            return self.pairwise
        return Upstream(
            lambda logps, responses: constants[responses].to(logps.dtype),
            batch.cu_seqlens,
            paired=False,
            lengths=batch.response_lengths,
        )


def joint_numbers(
    hidden: Tensor,
    head: FusedLMHead,
    batch: PairBatch,
    keys: Iterable[Joint],
    frozen: Distributions,
    known: KnownUpstream,
) -> tuple[Tensor, dict[Joint, Tensor]]:
    """Log-probabilities (N,) of the response tokens, and (N,) of each key, from hidden [N, D] and the policy's head.

    One walk for all keys that share one, the log-probabilities among them where it is over both responses at
    temperature 1; one recomputation for the gradients of each walk, and none where all it is asked for is `known`.
    """
    logps: Tensor | None = None
    found: dict[Joint, Tensor] = {}
    for walk, members in walks_of(keys).items():
        rows = rows_of(walk, batch)
        if walk.output == SCORE:
            found[walk] = _score(hidden, head.whole, walk, frozen, rows)
            continue
        if walk.output in KEPT:
            found[walk] = _of_kept(hidden, head.whole, *frozen.kept[walk.output], rows)
            continue
        other_hidden, other = frozen.one(walk.of)
        # Rows beyond the smaller head are padding of one tokenizer's vocabulary.
        size = min(head.out_features, other.vocab_size)
        own = head.whole if size == head.out_features else head.whole.columns(0, size)
        if walk.output == TOP_GAP:
            found[walk] = linear_top_gap(hidden, own, other_hidden, other.columns(0, size), rows)
            continue
        alone = logps is not None or rows is not None or walk.temperature != 1.0 or size < head.out_features
        names = {key.output: key for key in members}
        options: dict[str, Any] = {"beta": walk.beta, "temperature": walk.temperature, "rows": rows}
        arguments = (hidden, own, other_hidden, other.columns(0, size), None if alone else batch.labels)
        if all(key in known.joint for key in members) and (alone or known.logps is not None):
            upstream = {name: known.joint[key] for name, key in names.items()}
            upstream |= {} if alone else {LOGPS: known.per_token(batch)}
            numbers = known_joint(*arguments, upstream=upstream, **options)
        else:
            outputs: Any = (*names, *([] if alone else [LOGPS]))
            numbers = linear_joint(*arguments, outputs=outputs, **options)
        found |= {key: numbers[name] for name, key in names.items()}
        logps = logps if alone else numbers[LOGPS]
    if logps is None:
        own_logps = head(hidden, batch.labels, upstream=known.of_logps(batch))
        assert isinstance(own_logps, Tensor)
        logps = own_logps
    return logps, found


def walks_of(keys: Iterable[Joint]) -> dict[Joint, list[Joint]]:
    """The keys by their walks."""
    found: dict[Joint, list[Joint]] = {}
    for key in dict.fromkeys(keys):
        found.setdefault(key.walk, []).append(key)
    return found


def rows_of(walk: Joint, batch: PairBatch) -> Tensor | None:
    """(N,) bool, the response tokens that a walk is over; None for all, as in a batch of chosen responses."""
    paired = len(batch.response_lengths) > batch.num_pairs
    if walk.responses == "both" or not paired:
        return None
    position = torch.arange(len(batch.labels), device=batch.labels.device)
    chosen = position < batch.chosen_tokens
    return chosen if walk.responses == "chosen" else ~chosen


def _of_kept(hidden: Tensor, head: Head, ids: Tensor, probs: Tensor, rows: Tensor | None) -> Tensor:
    # A token beyond the policy's head is padding of the teacher's, whose probability goes to the tail.
    known = ids < head.vocab_size
    return linear_sparse_divergence(hidden, head, ids.where(known, -1), probs.where(known, 0.0), rows=rows)


def _score(hidden: Tensor, head: Head, walk: Joint, frozen: Distributions, rows: Tensor | None) -> Tensor:
    others = [(c, *frozen.of[whose]) for c, whose in walk.of]
    size = min(head.vocab_size, *(other.vocab_size for _, _, other in others))
    return linear_expected_score(
        hidden,
        head if size == head.vocab_size else head.columns(0, size),
        heads=[(c, h, other.columns(0, size)) for c, h, other in others],
        temperature=walk.temperature,
        clip=walk.clip,
        rows=rows,
    )
