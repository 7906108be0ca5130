"""Training steps of objectives over states against the same thing done the long way, row by row."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvkd_fast.commands.models import of_teacher
from tvkd_fast.data import MicroBatching, TokenizedPair, build_dataset, packed_length
from tvkd_fast.models import PolicyWithHead, TeacherWithHead
from tvkd_fast.scoring import OnlineScorer
from tvkd_fast.training.step import train_step

Run = dict[str, Tensor]
Formula = Callable[[Run, Run], Tensor]


def run_of(model: Any, pair: TokenizedPair, side: int) -> Run:
    """A response's token log-probabilities, and every layer's states at the tokens that predict it, normed as the last
    ones are: "0" the embedding's."""
    response = (pair.chosen_ids, pair.rejected_ids)[side]
    ids = torch.tensor([pair.prompt_ids + response])
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    predicting = slice(len(pair.prompt_ids) - 1, -1)
    *inner, last = (x[0, predicting] for x in out.hidden_states)
    states = {str(i): model.model.norm(x) for i, x in enumerate(inner)} | {"last": last}
    logps = out.logits[0, predicting].log_softmax(-1)
    return states | {"logps": logps, "of_labels": logps.gather(1, torch.tensor(response)[:, None])[:, 0]}


@pytest.fixture
def is_its_formula_from_states(
    files: Path, chatml: Any, tiny_model: Any, in_float64: Any
) -> Callable[..., PolicyWithHead]:
    """Checks a training step, in one micro-batch and in four, against the formula of a response under policy and
    teacher, averaged over a pair's two, with the likelihood of the chosen one. All gradients are compared."""

    def check(found: Any, formula: Formula, attached: Callable[[PolicyWithHead], None] = lambda policy: None) -> Any:
        pairs = list(build_dataset(files / "train.jsonl", chatml, limit=4, max_length=40))
        model, frozen = in_float64(tiny_model(0)), in_float64(tiny_model(1, hidden_size=48)).eval()
        policy = PolicyWithHead(model, packing="shared")
        attached(policy)
        losses = []
        for pair in pairs:
            ours = [run_of(model, pair, side) for side in (0, 1)]
            with torch.no_grad():
                theirs = [run_of(frozen, pair, side) for side in (0, 1)]
            distances = [formula(*both) for both in zip(ours, theirs, strict=True)]
            likelihood = found.likelihood_weight * ours[0]["of_labels"].mean()
            losses.append(found.distance_weight * sum(distances) / 2 - likelihood)
        wanted = torch.stack(losses).mean()
        wanted.backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
        before = deepcopy(policy.state_dict())
        kinds = of_teacher(found.needs)
        scorer = OnlineScorer(None, TeacherWithHead(frozen, packing="shared") if kinds else None, of_teacher=kinds)
        for tokens, count in ((2048, 1), (max(packed_length(pair) for pair in pairs), 4)):
            policy.load_state_dict(before)
            policy.zero_grad()
            batches = list(MicroBatching(tokens=tokens).batches(pairs, range(4)))
            assert len(batches) == count
            optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
            out = train_step(policy, scorer, batches, optimizer, found, clip_norm=0.0)
            torch.testing.assert_close(out.loss, wanted.detach(), rtol=1e-8, atol=1e-12)
            for name, parameter in policy.named_parameters():
                torch.testing.assert_close(before[name] - parameter, gradients[name], rtol=1e-6, atol=1e-9)
        return policy

    return check
