"""The root modules that training calls, and later shards: backbone and head in one forward, and no logits.

Letters: P pairs, L row length, N response tokens, M response states, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tvkd_fast.models.head import FusedLMHead, answering_layer, fuse_head
from tvkd_fast.models.lent import undone
from tvkd_fast.models.parts.layer_states import with_layer_states
from tvkd_fast.models.parts.mixed_embeddings import mixed_embeddings
from tvkd_fast.models.probe import probe_head, probe_packing, refuse_lost_softcap, required_autocast, states_alone
from tvkd_fast.models.prune import disable_dropout, few_layers
from tvkd_fast.models.shared_prompt import Layout, share_prompts, states_of
from tvkd_fast.ops import Upstream

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelBatch(Protocol):
    """The inputs that a model reads from a batch."""

    @property
    def input_ids(self) -> Tensor:
        """[2P, L] rows, padded on the right, where a causal model cannot see the padding; or one packed row."""

    @property
    def layout(self) -> Layout | None:
        """The places of the pairs and their parts in a packed row."""

    @property
    def attention_mask(self) -> Tensor | None:
        """[2P, L] of rows that leave out tokens between those that are read, None of others."""

    @property
    def predicting(self) -> Tensor:
        """(N,) flat positions in `input_ids` of the states that predict the response tokens."""

    @property
    def labels(self) -> Tensor:
        """(N,) the tokens they predict."""

    @property
    def states(self) -> Tensor:
        """(M,) flat positions of every response state, s_0 and s_T included."""


class PolicyWithHead(nn.Module):
    """A causal language model as the root that is called, sharded and trained: `forward(batch)` returns logps (N,).

    The model's head becomes a `FusedLMHead` where it stands; dropout is set to 0, since a log-ratio of two passes with
    different masks is noise; `probe_head` refuses a family whose logits it does not reproduce, on a few of its layers
    where the model is still on the meta device. A model that is refused is left as it was.
    `autocast` is the dtype of the products over weights of another dtype, None for the weights' own. With `packing`
    other than "padded" the model takes packed rows too, if `probe_packing` finds that they change nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        packing: Literal["shared", "unshared", "padded"] = "padded",
        autocast: torch.dtype | None = None,
        probe: bool = True,
    ) -> None:
        super().__init__()
        self.packing, self.autocast = packing, autocast
        refuse_lost_softcap(model)
        self.required_autocast = required = required_autocast(model, autocast)
        self.reduce_always = False
        if probe and model.device.type == "meta":
            # Nothing can be computed without weights, and what is probed is the family's code.
            type(self)(few_layers(model), packing=packing, autocast=autocast)
            probe = False
        with undone(model, on_error=True):
            fuse_head(model)
            disable_dropout(model)
            alone = states_alone(model, required) if probe and packing != "padded" else None
            if packing == "shared":
                share_prompts(model)
            if alone is not None:
                probe_packing(model, alone, shared=packing == "shared", autocast=required)
            if probe:
                probe_head(model, required)
        self.model = model
        self.beside = nn.ModuleDict()
        """What is trained with it and is no part of it, by name: see `models.parts`."""

    def forward(
        self,
        batch: ModelBatch,
        upstream: Upstream | Callable[[Tensor], Upstream | None] | None = None,
        *,
        collisions: bool = False,
        walk: Callable[..., Any] | None = None,
        layers: Sequence[int] = (),
    ) -> Any:
        """(N,) float32 log-probabilities of `batch.labels`; only response positions reach the head.

        `upstream` is what the loss will hand down to them, where that is known: the head then makes its gradient here.
        With `collisions` a second (N,) stands beside them, log Σ_v p(v)² of every token's distribution, without a
        gradient and by one more product; `upstream` may then be a function of it.

        With `walk`, and nothing else, the answer is that function's, of the states [N, D] that predict the labels and
        of the head: whatever else is computed from them belongs here, where a sharded head is whole. Where `layers`
        are given, inner ones, their states follow, each [N, D] as the head would read them (`with_layer_states`).
        """
        with self.precision():
            if walk is not None and layers:
                states, inner = with_layer_states(self.model, layers, lambda: self.states(batch), batch.predicting)
                return walk(states, self.head, *inner)
            if walk is not None:
                return walk(self.hidden(batch, batch.predicting), self.head)
            hidden, of_squares = self.hidden(batch, batch.predicting), None
            if collisions:
                of_squares = self.head.log_collisions(hidden)
            if callable(upstream):
                assert of_squares is not None
                upstream = upstream(of_squares)
            logps = self.head(hidden, batch.labels, upstream=upstream)
        return logps if of_squares is None else (logps, of_squares)

    @property
    def head(self) -> FusedLMHead:
        # Looked up at every call: FSDP and PEFT replace modules.
        head = answering_layer(self.model.get_output_embeddings())
        if not isinstance(head, FusedLMHead):
            raise ValueError(
                f"the head of this {type(self.model).__name__} was made a {type(head).__name__} after it became a "
                f"{type(self).__name__}: make the {type(self).__name__} anew"
            )
        return head

    @property
    def vocab_size(self) -> int:
        """Columns of the head: a padded vocabulary has more than its tokenizer."""
        return self.head.out_features

    def precision(self, *, required: bool = False) -> torch.autocast:
        """The products' precision, wherever the model is called: policy, reference and teacher must agree on it.

        With `required` the weights' own, of calls that generate, and autocast only where the attention needs it.
        """
        kind = self.model.device.type
        # Offloaded weights are on the meta device, which has no precision of its own.
        kind = "cpu" if kind == "meta" else kind
        dtype = self.required_autocast if required else self.autocast
        return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)

    def hidden(self, batch: ModelBatch, positions: Tensor) -> Tensor:
        """[len(positions), D] states of a batch at flat positions. Called from `forward` only."""
        return self.states(batch).flatten(0, 1)[positions]

    def states(self, batch: ModelBatch) -> Tensor:
        """[rows, L, D] states of a batch, likewise; of mixed embeddings where the batch has `partners`."""
        with mixed_embeddings(self.model, batch):
            return states_of(self.model, batch.input_ids, batch.layout, batch.attention_mask)


class TeacherWithHead(PolicyWithHead):
    """A frozen teacher: `forward(batch)` returns LSE(z) and LSE(κz) of every response state, two (M,) float32.

    Where `logps` is given, true or false, `values` says whether they are computed, and behind them stand the (N,)
    log-probabilities of the response tokens, by one more product, or None. Behind all stands what `walk` makes of the
    states that predict those tokens and of the head, where it is given.
    """

    def __init__(self, model: PreTrainedModel, *, kappa: float = 1.0, **options: Any) -> None:
        super().__init__(model, **options)
        self.eval().requires_grad_(False)
        self.kappa = kappa

    @property
    def policies(self) -> tuple[PolicyWithHead, ...]:
        """The models that this teacher calls."""
        return (self,)

    def forward(  # type: ignore[override]
        self,
        batch: ModelBatch,
        *,
        values: bool = True,
        logps: bool | None = None,
        walk: Callable[[Tensor, FusedLMHead], Any] | None = None,
    ) -> tuple[Any, ...]:
        of_tokens = bool(logps) or walk is not None
        positions = [batch.states] * values + [batch.predicting] * of_tokens
        if not positions:
            return (None,)
        with self.precision():
            states, *tokens = self.hidden(batch, torch.cat(positions)).split([len(x) for x in positions])
            hidden = tokens[0] if tokens else states
            found: list[Any] = list(self.head(states, kappa=self.kappa)) if values else []
            if logps is not None:
                found.append(self.head(hidden, batch.labels) if logps else None)
            return (*found, walk(hidden, self.head)) if walk is not None else tuple(found)
