"""The vocabulary over processes: each keeps its rows of head and embedding, and no one ever gathers them.

Where weights are sharded by FSDP2 a process gathers the whole head, V·D numbers, to compute its own N tokens. Here the
tokens travel: every process computes its rows' part for the tokens of all, and the parts are merged. That is less to
send where all processes' tokens together are fewer than the vocabulary, and never more than V/S rows to hold.

    lse   = log Σ_r exp lse_r                 merged of each process's own
    logp  = z_y − lse                         z_y is in one of them
    d/dz  = e_y − exp(lse_r − lse)·softmax_r  what each can do alone, once it has its lse_r and every process's upstream

Letters: S processes of a group, N tokens of one of them and M of all, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.functional import pad

from tvkd_fast._compat import own_part
from tvkd_fast.models import FusedLMHead, PolicyWithHead
from tvkd_fast.ops import Head, Upstream, linear_logps, linear_lse

_OUT_OF_THE_WAY = 64.0
"""e^−64 of a softmax is nothing in float32, and 64 takes none of a logit's digits that it has."""
_AT_ONCE = 256
"""Tokens whose rows of the head are read together."""
embedding_dense_backward = torch.ops.aten.embedding_dense_backward
IGNORED = -100
"""The label of a token that does not count, as everywhere."""


def share_vocabulary(policy: PolicyWithHead, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Head, and embedding where it is the same weight, in place; the weights that are shards now, for FSDP2 to leave.

    Raises ValueError where what is tied to the head is no table of rows.
    """
    head, looked_up = policy.head, policy.model.get_input_embeddings()
    tied = looked_up.weight is head.weight
    if not can_share_vocabulary(policy):
        raise ValueError(
            f"the head is tied to a {type(looked_up).__name__}, which is no nn.Embedding: set --parallel.vocabulary "
            "gathered"
        )
    rows = Rows(head.weight, mesh)
    shard = nn.Parameter(rows.shard(head.weight), requires_grad=head.weight.requires_grad)
    policy.model.set_output_embeddings(SharedHead.of(head, shard, rows, policy.autocast))
    if tied:
        share_table(looked_up, shard, rows)
    return {shard}


def can_share_vocabulary(policy: PolicyWithHead) -> bool:
    """Return whether nothing but a table of rows is tied to the head."""
    looked_up = policy.model.get_input_embeddings()
    return looked_up.weight is not policy.head.weight or isinstance(looked_up, nn.Embedding)


def states_held(processes: int, tokens: float, hidden: int, itemsize: int) -> float:
    """Bytes that a `SharedHead` holds most of tokens' states, N of them a process, in its backward.

    All states, their gradients by targets and by softmaxes, S·N·D each; or one gradient, its float32 sum over
    processes, and the own part of that.
    """
    return max(3 * itemsize * processes, (itemsize + 4) * processes + 4) * tokens * hidden


class Rows:
    """The rows of the vocabulary that this process has, and the collectives with those that have the others."""

    def __init__(self, weight: Tensor, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.group = mesh.get_group(mesh.ndim - 1)
        self.replicas = mesh.get_group(0) if mesh.ndim > 1 else None
        self.size, self.rank = distributed.get_world_size(self.group), distributed.get_rank(self.group)
        self.placements = (*[Replicate()] * (mesh.ndim - 1), Shard(0))
        shape, offset = own_part(weight.shape, mesh, self.placements)
        self.count, self.first = shape[0], offset[0]
        self.scale = 1.0 / mesh.size()
        """The factor of gradients: losses are multiplied by the number of processes, since FSDP2 averages."""

    def shard(self, weight: Tensor) -> DTensor:
        own = weight.detach()[self.first : self.first + self.count].clone()
        return DTensor.from_local(
            own, self.mesh, self.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )

    def own(self, weight: Tensor) -> Tensor:
        """Return [count, D], this process's rows, with a gradient over every process's tokens."""
        assert isinstance(weight, DTensor)
        return _OwnRows.apply(weight.to_local(grad_placements=self.placements), self)

    def among(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places of ids among the own rows, 0 for ids that are not among them, and which ids are."""
        places = ids - self.first
        here = (places >= 0) & (places < self.count)
        return places.where(here, 0), here

    def longest(self, length: int, device: torch.device) -> int:
        found = torch.tensor(length, device=device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.group)
        return int(found)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return [S·n, …], the [n, …] of each process in order; n is equal in all of them."""
        gathered = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        distributed.all_gather_into_tensor(gathered, x.contiguous(), group=self.group)
        return gathered

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return the [n, …] own sums of [S·n, …] parts, which are overwritten."""
        if x.device.type == "cpu":
            # gloo has no reduce_scatter of one tensor. A view of the sums would keep all of them.
            distributed.all_reduce(x, group=self.group)
            return x.chunk(self.size)[self.rank].clone()
        own = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        distributed.reduce_scatter_tensor(own, x, group=self.group)
        return own

    def all_reduce(self, x: Tensor) -> Tensor:
        distributed.all_reduce(x, group=self.group)
        return x

    def merged(self, lse: Tensor) -> Tensor:
        """Return the (M,) logsumexps of all rows from those of the own rows."""
        largest = lse.clone()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self.group)
        return largest + self.all_reduce((lse - largest).exp()).log()


class SharedHead(FusedLMHead):
    """A `FusedLMHead` of one process's rows: the same answers, for the same calls of every process together."""

    rows: Rows
    dtype: torch.dtype | None

    @classmethod
    def of(cls, head: FusedLMHead, shard: nn.Parameter, rows: Rows, dtype: torch.dtype | None) -> SharedHead:
        with torch.device("meta"):
            shared = cls(head.in_features, head.out_features, bias=head.bias is not None)
        shared.weight, shared.bias, shared.transforms = shard, head.bias, head.transforms
        shared.rows, shared.dtype = rows, dtype
        return shared.train(head.training)

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        kappa: float | None = None,
        upstream: Upstream | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden [N, D], labels (N,); N may differ from process to process. `upstream` is not used: no process has all
        of a token's logits when it would be asked for."""
        if labels is None and kappa is None:
            raise ValueError("whole logits are what a shared vocabulary has not: set --parallel.vocabulary gathered")
        rows, count = self.rows, hidden.shape[0]
        longest = rows.longest(count, hidden.device)
        dtype = hidden.dtype if self.dtype is None else self.dtype
        gathered = gathered_states(hidden.to(dtype), longest, rows)
        weight = rows.own(self.weight).to(dtype)
        bias = None if self.bias is None else self.bias[rows.first : rows.first + rows.count].to(dtype)
        nobodys = labels is not None and dtype.itemsize == 2
        if nobodys:
            weight, bias = self._with_nobodys_row(weight, bias)
        options: dict[str, Any] = {
            "bias": bias,
            "softcap": self.transforms.softcap,
            "logit_scale": self.transforms.logit_scale,
        }
        mine = slice(rows.rank * longest, rows.rank * longest + count)
        # What is filled up is no token: it would count among a sparse gradient's flat rows.
        tokens = rows.all_gather(pad(hidden.new_ones(count, dtype=torch.int64), (0, longest - count))) > 0
        if kappa is not None:
            nothing = hidden.new_full((gathered.shape[0],), -torch.inf, dtype=torch.float32)
            parts = (
                linear_lse(gathered, weight, kappa=kappa, rows=tokens, **options) if rows.count else (nothing, nothing)
            )
            lse, lse_kappa = (rows.merged(part)[mine] for part in parts)
            return lse, lse_kappa
        assert labels is not None
        places, here = rows.among(rows.all_gather(pad(labels, (0, longest - count), value=-1)))
        if rows.count == 0:
            logit = gathered.sum(1).float() * 0 + weight.sum() * 0
            lse = logit - torch.inf
        else:
            if nobodys:
                places = places.where(here, rows.count)
            elif bias is not None:
                # A token that a bias of -inf takes out of the vocabulary has no logit to measure by.
                places = places.where(here, bias.argmax())
            logit = self._logits(gathered, weight, bias, places)
            known = places.masked_fill(~tokens, IGNORED)
            logps = linear_logps(gathered, weight, known, ignore_index=IGNORED, **options, **self.gradient_options())
            lse = logit - logps
            if nobodys:
                assert bias is not None
                # A softcap lets that row have a share, which is taken out again.
                lse = lse + torch.log1p(-(self._transformed(bias[-1].to(lse.dtype)) - lse).exp())
        found = _Merged.apply(logit.where(here, 0.0), lse, rows, mine)
        return found.where(labels != IGNORED, 0.0)

    @property
    def whole(self) -> Head:
        raise ValueError(
            "no process has the whole head while the vocabulary is shared: set --parallel.vocabulary gathered for an "
            "objective over whole distributions"
        )

    def _with_nobodys_row(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The own rows and one of zeros, for targets that lie elsewhere: lse is measured by a logit, and its δ cancels.

        In 16 bits it would cancel to the rounding of a whole row. This row's multiplies nothing, its gradient is
        nobody's, and its bias keeps it out of every softmax that another row is in.
        """
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        low = bias.new_full((1,), -_OUT_OF_THE_WAY / self.transforms.logit_scale)
        return torch.cat([weight, weight.new_zeros(1, weight.shape[1])]), torch.cat([bias, low])

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor) -> Tensor:
        """(M,) of one row each, as the head makes them."""
        logits = _RowProducts.apply(hidden, weight, places)
        if bias is not None:
            logits = logits + bias[places].to(logits.dtype)
        return self._transformed(logits)

    def _transformed(self, products: Tensor) -> Tensor:
        logits = products * self.transforms.logit_scale
        cap = self.transforms.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class SharedEmbedding(nn.Embedding):
    """An embedding of one process's rows, which looks up what all of them ask for."""

    rows: Rows

    def forward(self, ids: Tensor) -> Tensor:
        """ids […] to […, D]; their number may differ from process to process."""
        flat, rows = ids.flatten(), self.rows
        longest = rows.longest(flat.shape[0], flat.device)
        gathered = rows.all_gather(pad(flat, (0, longest - flat.shape[0]), value=-1))
        places, here = rows.among(gathered)
        # A padding row has no gradient, as in nn.Embedding.
        learns = here if self.padding_idx is None else here & (gathered != self.padding_idx)
        found = _LookedUp.apply(rows.own(self.weight), places, here, learns, rows)
        return found[: flat.shape[0]].view(*ids.shape, -1)


def share_table(table: nn.Embedding, shard: nn.Parameter, rows: Rows) -> None:
    """Share the embedding in place, so that a family's own code around the lookup (Gemma scales) stays."""
    kind = type(table)
    if kind is nn.Embedding:
        table.__class__ = SharedEmbedding
    else:
        table.__class__ = type(f"Shared{kind.__name__}", (kind, SharedEmbedding), {})
    table.weight = shard
    table.rows = rows  # type: ignore[assignment]


class _OwnRows(torch.autograd.Function):
    """The rows themselves; their gradient summed over replicas, and divided by what losses were multiplied by."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient * ctx.rows.scale
        if ctx.rows.replicas is not None:
            distributed.all_reduce(gradient, group=ctx.rows.replicas)
        return gradient, None


def gathered_states(hidden: Tensor, longest: int, rows: Rows) -> Tensor:
    """[S·longest, D] of every process's [N, D], N ≤ longest; back, each one's own sum of all parts."""
    found: Tensor = _Gathered.apply(pad(hidden, (0, 0, 0, longest - hidden.shape[0])), rows)
    return found


class _Gathered(torch.autograd.Function):
    """[n, D] of each to [S·n, D]; back, each one's own sum of all parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return rows.all_gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Parts of a sum over processes: added in float32, whatever they were multiplied in.
        return ctx.rows.reduce_scatter(gradient.to(torch.float32, copy=True)).to(gradient.dtype), None


class _LookedUp(torch.autograd.Function):
    """Rows of weight [count, D] at places (S·n,) of those that are `here`, to [n, D] own; back, of those that learn.

    One tensor of S·n rows at a time, either way.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, places: Tensor, here: Tensor, learns: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(places, learns)
        ctx.rows, ctx.count = rows, len(weight)
        found = weight[places] if ctx.count else weight.new_zeros(len(places), weight.shape[1])
        return rows.reduce_scatter(found.mul_(here[:, None]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        places, learns = ctx.saved_tensors
        gathered = ctx.rows.all_gather(gradient).mul_(learns[:, None])
        if ctx.count == 0:
            return gathered[:0], None, None, None, None
        return embedding_dense_backward(gathered, places, ctx.count, -1, False), None, None, None, None


class _RowProducts(torch.autograd.Function):
    """hidden [M, D] times one row each of weight [count, D], (M,): a few tokens at a time, and no rows are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, places)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        parts = zip(hidden.split(_AT_ONCE), places.split(_AT_ONCE), strict=True)
        return torch.cat([(x.to(wide) * weight[at].to(wide)).sum(1) for x, at in parts])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, places = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        if d_hidden is not None:
            for start in range(0, len(places), _AT_ONCE):
                some = slice(start, start + _AT_ONCE)
                d_hidden[some] = (gradient[some, None] * weight[places[some]]).to(hidden.dtype)
        d_weight = _summed_by_row(hidden, gradient, places, weight) if ctx.needs_input_grad[1] else None
        return d_hidden, d_weight, None


def _summed_by_row(hidden: Tensor, gradient: Tensor, places: Tensor, weight: Tensor) -> Tensor:
    """Σ_t gradient_t·hidden_t [count, D] over the tokens of each place, in weight's dtype."""
    total = torch.zeros_like(weight, dtype=gradient.dtype)
    if len(places) == 0:
        return total.to(weight.dtype)
    order = places.argsort(stable=True)
    # Of sorted tokens each few touch rows of their own, and all of them together touch each row about once.
    firsts, lasts = (places[order[i::_AT_ONCE]].tolist() for i in (0, _AT_ONCE - 1))
    if len(lasts) < len(firsts):
        lasts.append(int(places[order[-1]]))
    for some, first, last in zip(order.split(_AT_ONCE), firsts, lasts, strict=True):
        total[first : last + 1] += embedding_dense_backward(
            gradient[some, None] * hidden[some], places[some] - first, last + 1 - first, -1, False
        )
    return total.to(weight.dtype)


class _Merged(torch.autograd.Function):
    """(M,) target logits, 0 where another process has the target, and lse of the own rows, to (N,) own tokens' logp."""

    @staticmethod
    def forward(ctx: Any, logit: Tensor, lse: Tensor, rows: Rows, mine: slice) -> Tensor:
        lse_of_all = rows.merged(lse)
        ctx.save_for_backward(lse, lse_of_all)
        ctx.rows = rows
        return (rows.all_reduce(logit.clone()) - lse_of_all)[mine]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        lse, lse_of_all = ctx.saved_tensors
        rows = ctx.rows
        longest = lse.shape[0] // rows.size
        gathered = rows.all_gather(pad(gradient, (0, longest - gradient.shape[0])))
        return gathered, -gathered * (lse - lse_of_all).exp(), None, None
