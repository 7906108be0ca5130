"""Objectives of this library in TRL's trainer, beside the same losses of whole logits in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'tvkd_fast[trl]'")

from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvkd_fast.integrations.rows import DATA_REWARDS
from tvkd_fast.integrations.trl import TVKDConfig, TVKDTrainer
from tvkd_fast.integrations.trl_objective import ANSWERED, batch_of
from tvkd_fast.objectives import Need, Objective, PolicyNumbers, objectives
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.ipo import IPO
from tvkd_fast.objectives.mixtures.mixture import Mixture
from tvkd_fast.objectives.rewards.m_dpo import MDPO
from tvkd_fast.objectives.simpo import SimPO
from tvkd_fast.objectives.tvkd import TVKD
from tvkd_fast.objectives.wpo import WPO
from tvkd_fast.scoring import Scores

ROWS = [
    {
        "prompt": f"{i}: say it.",
        "chosen": " it" * (1 + i % 3),
        "rejected": f" no {i}",
        "score_chosen": 1.0 + i,
        "score_rejected": 0.5 * i,
    }
    for i in range(4)
]
TAKEN = [
    cls()
    for name, cls in objectives().items()
    if cls().needs <= ANSWERED
    and Need.REJECTED in cls().needs
    and cls.divided_by == "pairs"
    and cls is not Mixture
    and not cls().alone
]
TAKEN += [MDPO(score_from="perplexity"), Mixture(parts=[{"dpo": {"beta": 0.3}}, {"simpo": {}, "weight": 0.5}])]


@pytest.fixture
def make(tmp_path: Path, folders: tuple[str, str]) -> Callable[..., Any]:
    """A trainer over four pairs, in one batch; keywords of it, or of its config."""

    def trainer(objective: Any, *, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Any:
        given = {name: changes.pop(name) for name in ("teacher_model", "ref_model") if name in changes}
        options: dict[str, Any] = {
            "per_device_train_batch_size": 4,
            "max_length": 40,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "gradient_checkpointing": False,
        }
        return TVKDTrainer(
            AutoModelForCausalLM.from_pretrained(folders[0]),
            args=TVKDConfig(str(tmp_path), **options | changes),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folders[0]),
            objective=objective,
            **given,
        )

    return trainer


def numbers(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(2P,) log π and Σ_t log Σp² of the responses, from whole logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    mask, logps = batch["completion_mask"][:, 1:], logits.log_softmax(-1)
    of_labels = logps.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (of_labels * mask).sum(1), ((2 * logps).logsumexp(-1) * mask).sum(1).detach()


@pytest.mark.parametrize("objective", TAKEN, ids=lambda objective: f"{objective.name} {objective.describe()}")
def test_loss_and_gradient_are_those_of_whole_logits(
    objective: Objective, make: Callable[..., Any], folders: tuple[str, str]
) -> None:
    models = {"ref_model": folders[1]} if Need.REFERENCE in objective.needs else {}
    given = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in models.items()}
    teacher = {"teacher_model": folders[1]} if Need.TEACHER_LOGPS in objective.needs else {}
    trainer = make(objective, **given, **teacher)
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_loss(trainer.model, dict(batch))
    found.backward()

    policy, other = (AutoModelForCausalLM.from_pretrained(folder).double() for folder in folders)
    logps, squares = numbers(policy, batch)
    with torch.no_grad():
        of_other = numbers(other, batch)[0]
    mine = batch_of(batch, batch.get(DATA_REWARDS))
    scores = Scores(of_other, teacher_logps=of_other)
    want = objective.loss(PolicyNumbers(logps, mine.lengths, squares), scores, mine).losses.mean()
    want.backward()
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    theirs = dict(policy.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None
        want_grad = theirs[name].grad
        error = (parameter.grad.double() - want_grad).norm() / want_grad.norm()
        assert error < 1e-4, (name, float(error))


@pytest.mark.parametrize("head", ["tvkd", "trl"])
def test_training_by_name_lowers_the_loss_and_shows_its_rewards(make: Callable[..., Any], head: str) -> None:
    trainer = make("simpo", max_steps=4, fused_head=head)
    assert trainer.ref_model is None
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    margins = [line["rewards/chosen"] - line["rewards/rejected"] for line in lines]
    assert [line["rewards/margins"] for line in lines] == pytest.approx(margins, abs=1e-4)
    assert margins[0] != pytest.approx(0.0, abs=1e-3)


def test_dpo_by_name_is_trls_own_loss(make: Callable[..., Any]) -> None:
    losses = []
    for objective in ("dpo", None):
        trainer = make(objective, max_steps=3)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_tvkds_settings_become_the_trainers(make: Callable[..., Any], folders: tuple[str, str]) -> None:
    teacher = folders[1]
    trainer = make(TVKD(beta=0.3, gamma=0.9, alpha=0.5, terminal="zero"), teacher_model=teacher, max_steps=2)
    same = make(None, teacher_model=teacher, beta=0.3, gamma=0.9, alpha=0.5, terminal="zero", max_steps=2)
    for one in (trainer, same):
        one.train()
    lines = [[x for x in one.state.log_history if "loss" in x] for one in (trainer, same)]
    assert [x["loss"] for x in lines[0]] == pytest.approx([x["loss"] for x in lines[1]], rel=1e-6)
    assert lines[0][0]["tvkd/shaping_margins"] != 0


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        ("simpoo", {}, "did you mean simpo"),
        (3, {}, "objective is a int"),
        ("sft", {}, "sft is no loss over pairs"),
        ("mixture", {}, "mixture is no loss over pairs"),
        ("kto", {}, r"kto needs labels of single responses.* run `tvkd train --objective kto`"),
        ("forward_kl", {}, r"forward_kl needs the teacher's states"),
        ("self_distillation", {}, r"self_distillation needs more than numbers per response"),
        (TVKD(label_smoothing=0.1), {}, "smooths no labels"),
        (SimPO(), {"beta": 0.5}, "beta of TVKDConfig would not be read"),
        (DPO(), {"loss_type": ["ipo"]}, "loss_type of TVKDConfig would not be read"),
        ("dadpo", {}, "dadpo reads the teacher's log-probabilities: give teacher_model"),
        ("simpo", {"teacher_model": "folder"}, "simpo reads no teacher"),
        ("simpo", {"precompute_ref_log_probs": True}, "simpo reads no reference: leave precompute_ref_log_probs out"),
        (IPO(), {"rewards": ["score"]}, "ipo reads no rewards"),
        (MDPO(), {"rewards": ["score", "rating"]}, "m_dpo reads one reward and rewards names 2"),
        (WPO(), {"fused_head": "trl"}, "set fused_head='tvkd'"),
        ("d_dpo", {"rows": [{k: v for k, v in row.items() if "score" not in k} for row in ROWS]}, "missing reward"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_cannot_be_is_refused(
    objective: Any, changes: dict[str, Any], words: str, make: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=words):
        make(objective, **changes)


def test_an_objective_of_more_than_numbers_per_response_is_refused(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DPO, "needs", property(lambda self: frozenset({Need.REJECTED, Need.TEACHER_REWARDS})))
    with pytest.raises(ValueError, match=r"dpo needs the teacher's rewards .* run `tvkd train --objective dpo`"):
        make("dpo")
