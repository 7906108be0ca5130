"""Numbers of responses that objectives are computed from."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.commands.models import of_teacher
from tvkd_fast.data import PairBatch, TokenizedPair, build_dataset, collate_packed
from tvkd_fast.models import PolicyWithHead, TeacherWithHead
from tvkd_fast.objectives import Joint, Need, PolicyNumbers
from tvkd_fast.objectives.mixtures.mixture import Mixture
from tvkd_fast.ops import Head
from tvkd_fast.scoring import OnlineScorer, Scores
from tvkd_fast.training.step import train_step

Rewards = tuple[tuple[float, float], ...]


def make_batch(
    lengths: list[tuple[int, int]], *, chosen_only: bool = False, rewards: Rewards = ((1.0, 0.25), (0.5, 2.0))
) -> PairBatch:
    pairs = [
        TokenizedPair(
            [1, 2],
            [3] * c,
            [4] * r,
            True,
            True,
            "row",
            rewards=rewards,
            desirable=i % 2 == 0,
            sampler_logps=(-0.5,) * c,
        )
        for i, (c, r) in enumerate(lengths)
    ]
    batch = collate_packed(pairs, range(len(pairs)), chosen_only=chosen_only)
    return replace(batch, baseline=torch.tensor(0.75, dtype=torch.float64))


class JointDraws(dict[Joint, Tensor]):
    """(N,) float64 leaves for whatever number of both vocabularies is asked for."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.draw = tokens, torch.Generator().manual_seed(1)

    def __missing__(self, key: Joint) -> Tensor:
        self[key] = x = torch.rand(self.tokens, generator=self.draw, dtype=torch.float64).requires_grad_()
        return x


def make_numbers(batch: PairBatch) -> tuple[PolicyNumbers, Scores]:
    """Log-probabilities as float64 leaves, and everything that an objective may need."""
    draw = torch.Generator().manual_seed(0)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=draw, dtype=torch.float64)

    responses, states = len(batch.lengths), int(batch.cu_states[-1])
    logps = (-10 + normal(responses)).requires_grad_()
    lse = 5 + normal(states)
    hidden, head = torch.zeros(len(batch.labels), 2), Head(torch.zeros(9, 2))
    of_models: dict[str, Any] = {
        f"{whose}_{x}": y for whose in ("teacher", "ref", "base") for x, y in (("hidden", hidden), ("head", head))
    }
    top = torch.arange(3).expand(len(batch.labels), -1)
    of_models |= {"topk_ids": top, "topk_logps": torch.full(top.shape, -2.0)}
    of_models |= {"sampled_ids": top, "sampled_shares": torch.full(top.shape, 1 / 3)}
    scores = Scores(
        -10 + normal(responses), lse, lse, normal(states), teacher_logps=-10 + normal(responses), **of_models
    )
    log_collisions, token_logps = -9 + normal(responses), -1 - normal(len(batch.labels)).abs()
    joint = JointDraws(len(batch.labels))
    return PolicyNumbers(logps, batch.lengths, log_collisions, joint, token_logps.requires_grad_()), scores


@pytest.fixture
def batch_of() -> Callable[..., PairBatch]:
    return make_batch


@pytest.fixture
def numbers_of() -> Callable[[PairBatch], tuple[PolicyNumbers, Scores]]:
    return make_numbers


Response = dict[str, Any]
Formula = Callable[..., Tensor]


@pytest.fixture
def is_its_formula(batch_of: Any, numbers_of: Any) -> Callable[..., None]:
    """Checks losses and gradients of an objective against a formula of one pair, in float64.

    The formula is given dicts of the chosen and of the rejected response: logp, ref_logp, teacher_logp, length, rewards
    and log_collisions.
    """

    def check(found: Any, formula: Formula) -> None:
        batch = batch_of([(3, 5), (2, 2), (7, 1)])
        policy, scores = numbers_of(batch)
        responses = [
            {
                "logp": policy.logps[i],
                "ref_logp": scores.ref_logps[i],
                "teacher_logp": scores.teacher_logps[i],
                "length": int(batch.lengths[i]),
                "rewards": batch.rewards[:, i].tolist(),
                "log_collisions": policy.log_collisions[i],
            }
            for i in range(6)
        ]
        wanted = torch.stack([formula(responses[i], responses[i + 3]) for i in range(3)])
        out = found.loss(policy, scores, batch)
        torch.testing.assert_close(out.losses, wanted, rtol=1e-12, atol=1e-12)
        ours, twin = (torch.autograd.grad(x.sum(), policy.logps, retain_graph=True)[0] for x in (out.losses, wanted))
        torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-12)

    return check


@pytest.fixture
def is_its_formula_from_logits(files: Path, chatml: Any, tiny_model: Any, in_float64: Any) -> Callable[..., None]:
    """Checks a training step, in one micro-batch and in four, against a formula of whole float64 logits, row by row.

    The formula is that of `is_its_formula`, and is given log_p, log_ref, log_teacher and log_base [T, V] beside: the
    whole distributions; that of a mixture the divisors by name as well. Loss and the gradient of every weight are
    compared.
    """

    def check(found: Any, formula: Formula) -> None:
        dataset = build_dataset(files / "train.jsonl", chatml, limit=4, max_length=40)
        pairs = [replace(pair, rewards=((1.0 + i, 0.5), (0.25, 0.125 * i))) for i, pair in enumerate(dataset)]
        models = [in_float64(tiny_model(seed)) for seed in range(4)]
        policy = models[0]
        counts = divisors(pairs)
        # The parts of a mixture are divided apart, each by its own.
        of_pair = formula if isinstance(found, Mixture) else lambda *x: formula(*x) / counts[found.divided_by]
        more = (counts,) if isinstance(found, Mixture) else ()
        losses = [of_pair(*(long_way(models, pair, side) for side in (0, 1)), *more) for pair in pairs]
        wanted = torch.stack(losses).sum()
        wanted.backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
        before = deepcopy(policy.state_dict())
        reference, teacher, base = (model.eval() for model in models[1:])
        scorer = OnlineScorer(
            PolicyWithHead(reference, packing="shared"),
            TeacherWithHead(teacher, packing="shared"),
            of_teacher=of_teacher(found.needs),
            reference_states=Need.REFERENCE_STATES in found.needs,
            base=PolicyWithHead(base, packing="shared") if Need.BASE_STATES in found.needs else None,
        )
        chosen_only = Need.REJECTED not in found.needs
        # A process that is short of micro-batches has an empty one.
        for rows in ([[0, 1, 2, 3]], [[0], [1], [2], [3], []]):
            policy.load_state_dict(before)
            policy.zero_grad()
            batches = [collate_packed([pairs[i] for i in row], row, chosen_only=chosen_only) for row in rows]
            optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
            out = train_step(PolicyWithHead(policy, packing="shared"), scorer, batches, optimizer, found, clip_norm=0.0)
            torch.testing.assert_close(out.loss, wanted.detach(), rtol=1e-10, atol=1e-12)
            for name, parameter in policy.named_parameters():
                torch.testing.assert_close(before[name] - parameter, gradients[name], rtol=1e-7, atol=1e-10)

    return check


def divisors(pairs: list[TokenizedPair]) -> dict[str, int]:
    """What summed losses may be divided by."""
    chosen, rejected = (
        sum(len(ids) for ids in side) for side in zip(*((p.chosen_ids, p.rejected_ids) for p in pairs), strict=True)
    )
    return {"pairs": len(pairs), "chosen_tokens": chosen, "tokens": chosen + rejected}


def long_way(models: list[Any], pair: TokenizedPair, side: int) -> Response:
    """The numbers of a pair's chosen (0) or rejected (1) response from the logits of policy, reference and teacher."""
    response = (pair.chosen_ids, pair.rejected_ids)[side]
    logps = []
    for model in models:
        logits = model(input_ids=torch.tensor([pair.prompt_ids + response]), use_cache=False).logits
        logps.append(logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1))
    of_tokens = [x.gather(1, torch.tensor(response)[:, None]).sum() for x in logps]
    return {
        "logp": of_tokens[0],
        "ref_logp": of_tokens[1].detach(),
        "teacher_logp": of_tokens[2].detach(),
        "length": len(response),
        "rewards": [column[side] for column in pair.rewards],
        "log_collisions": logps[0].detach().exp().square().sum(-1).log().sum(),
        "log_p": logps[0],
        "log_ref": logps[1].detach(),
        "log_teacher": logps[2].detach(),
        "log_base": logps[3].detach(),
    }
