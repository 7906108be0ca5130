"""The step against a twin that does everything the long way: whole logits, a row at a time, in float64."""

import math
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tvkd_fast.data import MicroBatching, build_dataset, collate_packed, micro_batches
from tvkd_fast.models import PolicyWithHead, TeacherWithHead
from tvkd_fast.objectives import Need
from tvkd_fast.objectives.cpo import CPO
from tvkd_fast.objectives.dadpo import DaDPO
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.dpo_norm import DPONorm
from tvkd_fast.objectives.ipo import IPO
from tvkd_fast.objectives.orpo import ORPO
from tvkd_fast.objectives.rewards.d_dpo import DistilledDPO
from tvkd_fast.objectives.rewards.e_dpo import EnsembleDPO
from tvkd_fast.objectives.rewards.m_dpo import MDPO
from tvkd_fast.objectives.robust import Robust
from tvkd_fast.objectives.sft import SFT
from tvkd_fast.objectives.simpo import SimPO
from tvkd_fast.objectives.tvkd import TVKD
from tvkd_fast.objectives.wpo import WPO
from tvkd_fast.ops import known as known_ops
from tvkd_fast.scoring.layout import Scores
from tvkd_fast.scoring.scorer import OnlineScorer, RewardTeacher
from tvkd_fast.training.step import train_step


@pytest.fixture
def dataset(files, chatml):
    return build_dataset(files / "train.jsonl", chatml, limit=5, max_length=40)


@pytest.fixture
def models(tiny_model, in_float64):
    policy, reference, teacher = (in_float64(tiny_model(seed)) for seed in range(3))
    return policy, reference.eval(), teacher.eval()


def row_logits(model, prompt, response):
    return model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 :]


def row_logp(model, prompt, response):
    logps = row_logits(model, prompt, response)[:-1].log_softmax(-1)
    return logps.gather(1, torch.tensor(response)[:, None]).sum()


def row_return(teacher, prompt, response, ended, config):
    z = row_logits(teacher, prompt, response)
    scale = config.beta if config.value_scale is None else config.value_scale
    source = z.log_softmax(-1) if config.value_from == "logprobs" else z
    values = (scale / config.kappa * (config.kappa * source).logsumexp(-1)).tolist()
    if config.terminal == "zero":
        values[-1] = 0.0
    if config.terminal == "last_content" and ended:
        values = values[:-1]
    return sum(config.gamma * after - before for before, after in pairwise(values))


def reward_return(teacher, own, prompt, response, ended, config):
    gains = [
        model_logits[:-1].log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        for model_logits in (row_logits(teacher, prompt, response), row_logits(own, prompt, response))
    ]
    scale = config.beta if config.value_scale is None else config.value_scale
    values = [0.0, *(scale * (gains[0] - gains[1]).cumsum(0)).tolist()]
    if config.terminal == "zero":
        values[-1] = 0.0
    if config.terminal == "last_content" and ended:
        values = values[:-1]
    return sum(config.gamma * after - before for before, after in pairwise(values))


def rewards_of(config):
    return Need.TEACHER_REWARDS in config.needs


def twin_loss(models, dataset, config):
    policy, reference, teacher = models
    losses = []
    for pair in dataset:
        margin = 0.0
        for sign, response, ended in (
            (1, pair.chosen_ids, pair.chosen_ended),
            (-1, pair.rejected_ids, pair.rejected_ended),
        ):
            with torch.no_grad():
                ref = row_logp(reference, pair.prompt_ids, response)
                shaping = 0.0
                if rewards_of(config):
                    shaping = config.alpha * reward_return(teacher, reference, pair.prompt_ids, response, ended, config)
                elif isinstance(config, TVKD):
                    shaping = config.alpha * row_return(teacher, pair.prompt_ids, response, ended, config)
            rho = row_logp(policy, pair.prompt_ids, response) - ref
            margin = margin + sign * (config.beta * rho - shaping)
        smoothing = config.label_smoothing
        losses.append(
            -(1 - smoothing) * torch.nn.functional.logsigmoid(margin)
            - smoothing * torch.nn.functional.logsigmoid(-margin)
        )
    return torch.stack(losses).mean()


CONFIGS = [
    DPO(),
    TVKD(),
    TVKD(gamma=0.9, terminal="eos", alpha=0.5, label_smoothing=0.1),
    TVKD(gamma=0.95, terminal="zero", kappa=0.7, value_scale=0.3, beta=0.2),
    TVKD(gamma=0.5, kappa=0.7, value_from="logprobs", alpha=-1.0),
    TVKD(value_from="implicit_reward"),
    TVKD(value_from="implicit_reward", gamma=0.9, terminal="zero", value_scale=0.3),
]


BATCHINGS = [
    *(MicroBatching("padded", pairs=pairs) for pairs in (1, 2, 5)),
    *(MicroBatching(packing, tokens=tokens) for packing in ("unshared", "shared") for tokens in (100, 2048)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name} {config.describe()}")
@pytest.mark.parametrize("batching", BATCHINGS)
def test_loss_and_gradient_are_the_twins(config, batching, models, dataset):
    policy, reference, teacher = models
    expected = twin_loss(models, dataset, config)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    frozen = PolicyWithHead(reference, packing=batching.packing)
    if rewards_of(config):
        of_values = RewardTeacher(PolicyWithHead(teacher, packing=batching.packing), frozen)
    else:
        of_values = TeacherWithHead(teacher, kappa=config.teacher_kappa, packing=batching.packing)  # type: ignore[assignment]
    out = train_step(
        PolicyWithHead(policy, packing=batching.packing),
        OnlineScorer(frozen, of_values),
        list(batching.batches(dataset, range(len(dataset)))),
        torch.optim.SGD(policy.parameters(), lr=1.0),
        config,
        clip_norm=0.0,
    )
    torch.testing.assert_close(out.loss, expected.detach(), rtol=1e-10, atol=1e-12)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(before[name] - parameter, wanted[name], rtol=1e-7, atol=1e-10)
    norm = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    assert float(out.grad_norm) == pytest.approx(norm, rel=1e-7)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_sft_is_the_mean_over_chosen_tokens(batching, models, dataset):
    policy = models[0]
    tokens = sum(len(p.chosen_ids) for p in dataset)
    expected = -sum(row_logp(policy, p.prompt_ids, p.chosen_ids) for p in dataset) / tokens
    out = train_step(
        PolicyWithHead(policy, packing=batching.packing),
        OnlineScorer(None, None),
        list(batching.batches(dataset, range(len(dataset)), chosen_only=True)),
        torch.optim.SGD(policy.parameters(), lr=0.1),
        SFT(),
        clip_norm=1.0,
    )
    torch.testing.assert_close(out.loss, expected.detach(), rtol=1e-10, atol=1e-12)
    assert out.outputs == []


def test_an_empty_micro_batch_adds_nothing_and_goes_through_everything(models, dataset):
    policy, reference, teacher = models
    losses = []
    for empty in ([], [collate_packed([], [])]):
        batches = [*MicroBatching().batches(dataset, range(len(dataset))), *empty]
        out = train_step(
            PolicyWithHead(policy, packing="shared"),
            OnlineScorer(PolicyWithHead(reference, packing="shared"), TeacherWithHead(teacher, packing="shared")),
            batches,
            torch.optim.SGD(policy.parameters(), lr=0.0),
            TVKD(),
            clip_norm=1.0,
        )
        losses.append((out.loss, out.grad_norm))
    assert losses[0] == losses[1]
    logps = PolicyWithHead(policy, packing="shared")(collate_packed([], []))
    assert logps.shape == (0,)
    logps.sum().backward()
    assert all(p.grad is not None and not p.grad.count_nonzero() for p in policy.parameters())


OTHERS = [SimPO, IPO, CPO, ORPO, Robust, DPONorm, DaDPO, WPO, DistilledDPO, EnsembleDPO, MDPO]
OBJECTIVES = [SFT(), DPO(label_smoothing=0.1), TVKD(gamma=0.9), *(make() for make in OTHERS)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
@pytest.mark.parametrize("packing", ["padded", "shared"])
def test_the_head_makes_its_gradient_in_the_forward(objective, packing, models, dataset, monkeypatch):
    dataset = [replace(pair, rewards=((1.0, 0.5), (2.0, 0.0))) for pair in dataset]

    def backward(*args):
        raise AssertionError("logits were computed again")

    batching = MicroBatching(packing, pairs=2, tokens=100)
    found = []
    for known in (True, False):
        policy, reference, teacher = map(deepcopy, models)
        scorer = OnlineScorer(
            PolicyWithHead(reference, packing=packing),
            TeacherWithHead(teacher, packing=packing),
            of_teacher=("values", "logps"),
        )
        with monkeypatch.context() as patch:
            if known:
                patch.setattr(known_ops, "gradients_op", backward)
            else:
                patch.setattr(type(objective), "per_pair", False)
            train_step(
                PolicyWithHead(policy, packing=packing),
                scorer,
                list(batching.batches(dataset, range(len(dataset)), chosen_only=isinstance(objective, SFT))),
                torch.optim.SGD(policy.parameters(), lr=1.0),
                objective,
                clip_norm=0.0,
            )
        found.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_gradients_are_clipped_to_the_norm(models, dataset):
    policy, reference, _ = models
    before = [p.detach().clone() for p in policy.parameters()]
    out = train_step(
        PolicyWithHead(policy),
        OnlineScorer(PolicyWithHead(reference), None),
        list(micro_batches(dataset, range(len(dataset)), size=5)),
        torch.optim.SGD(policy.parameters(), lr=1.0),
        DPO(),
        clip_norm=0.25,
    )
    moved = torch.cat([(b - p).detach().flatten() for b, p in zip(before, policy.parameters(), strict=True)])
    assert float(out.grad_norm) > 0.25
    assert float(moved.norm()) == pytest.approx(0.25, rel=1e-4)


class BrokenReference:
    def of(self, batch):
        return Scores(torch.full((2 * batch.num_pairs,), torch.nan), None, None)


def test_a_step_that_is_not_finite_leaves_the_weights_and_names_its_pairs(models, dataset):
    policy = models[0]
    before = [p.detach().clone() for p in policy.parameters()]
    with pytest.raises(FloatingPointError, match=r"not finite in the step of pairs \[0, 3\]: the weights were left"):
        train_step(
            PolicyWithHead(policy),
            BrokenReference(),
            list(micro_batches(dataset, [3, 0], size=1)),
            torch.optim.SGD(policy.parameters(), lr=1.0),
            DPO(),
            clip_norm=1.0,
        )
    assert all(torch.equal(b, p) for b, p in zip(before, policy.parameters(), strict=True))
