"""Losses of TRL's own trainers on the numbers that ours are given."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'tvkd_fast[trl]'")

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tvkd_fast.data import TokenizedPair, collate_packed
from tvkd_fast.objectives import Objective, PolicyNumbers
from tvkd_fast.objectives.cpo import CPO
from tvkd_fast.objectives.divergences.jsd import JSD
from tvkd_fast.objectives.dpo import DPO
from tvkd_fast.objectives.dpo_norm import DPONorm
from tvkd_fast.objectives.ipo import IPO
from tvkd_fast.objectives.orpo import ORPO
from tvkd_fast.objectives.robust import Robust
from tvkd_fast.objectives.unpaired.kto import KTO
from tvkd_fast.objectives.wpo import WPO
from tvkd_fast.ops import linear_joint
from tvkd_fast.scoring import Scores

ON_A_CPU: dict[str, Any] = {
    "max_length": 40,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
}


@pytest.fixture
def theirs(tmp_path: Path, folders: tuple[str, str]) -> Callable[..., tuple[Tensor, PolicyNumbers, Scores]]:
    """TRL's loss of a batch, and the numbers of its responses from whole logits."""
    from datasets import Dataset

    rows = [{"prompt": f"{i}: say it.", "chosen": " it" * (1 + i % 3), "rejected": f" no {i}"} for i in range(4)]

    def make(**options: Any) -> tuple[Tensor, PolicyNumbers, Scores]:
        args = DPOConfig(str(tmp_path), **ON_A_CPU, **options)
        policy, reference = map(AutoModelForCausalLM.from_pretrained, folders)
        trainer = DPOTrainer(
            model=policy,
            ref_model=reference,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folders[0]),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        policy.train(False)
        with torch.no_grad():
            loss = trainer.compute_loss(policy, dict(batch))
            logps, lengths, squares = numbers(policy, batch)
            ref_logps, _, _ = numbers(reference, batch)
        return loss, PolicyNumbers(logps, lengths, squares), Scores(ref_logps)

    return make


def numbers(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    mask, logps = batch["completion_mask"][:, 1:], logits.log_softmax(-1)
    of_labels = logps.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    squares = (2 * logps).logsumexp(-1)
    return (of_labels * mask).sum(1), mask.sum(1), (squares * mask).sum(1)


@pytest.mark.each_once("e2e")
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"loss_type": ["sigmoid"], "beta": 0.3}, DPO(beta=0.3)),
        ({"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.2}, Robust(beta=0.3, label_smoothing=0.2)),
        ({"loss_type": ["sigmoid_norm"], "beta": 5.0}, DPONorm()),
        ({"loss_type": ["ipo"], "beta": 0.3}, IPO(beta=0.3)),
    ],
    ids=lambda x: x.name if isinstance(x, Objective) else "",
)
def test_dpo_and_its_kin_are_trls(options: dict[str, Any], found: Objective, theirs: Callable[..., Any]) -> None:
    loss, policy, scores = theirs(**options)
    ours = found.loss(policy, scores, None).losses.mean()  # type: ignore[arg-type]
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)


def test_kto_is_trls(tmp_path: Path, folders: tuple[str, str]) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": f"{i}: say it.", "completion": " it" * (1 + i % 3) + f" {i}", "label": i % 3 > 0} for i in range(4)
    ]
    policy, reference = map(AutoModelForCausalLM.from_pretrained, folders)
    args = KTOConfig(
        str(tmp_path),
        **ON_A_CPU,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    trainer = KTOTrainer(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folders[0]),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    policy.train(False)
    others = {name: batch[f"KL_{name}"] for name in ("input_ids", "attention_mask", "completion_mask")}
    with torch.no_grad():
        loss = trainer.compute_loss(policy, dict(batch))
        logps, ref_logps = (numbers(model, batch)[0] for model in (policy, reference))
        of_others = [numbers(model, others)[0] for model in (policy, reference)]
    pairs = [TokenizedPair([1], [2], [3], True, True, "row", desirable=bool(label)) for label in batch["label"]]
    baseline = (of_others[0] - of_others[1]).mean().clamp(min=0)
    mine = replace(collate_packed(pairs, range(4), chosen_only=True), baseline=baseline)
    found = KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    ours = found.loss(PolicyNumbers(logps, mine.lengths), Scores(ref_logps), mine).losses.mean()
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)


def test_wpo_is_trls_where_no_weight_passes_1(theirs: Callable[..., Any]) -> None:
    loss, policy, scores = theirs(use_weighting=True, beta=0.3)
    weights = ((policy.logps - policy.log_collisions) / policy.lengths).view(2, -1).sum(0).exp()
    ours = WPO(beta=0.3).loss(policy, scores, None).losses  # type: ignore[arg-type]
    torch.testing.assert_close((ours * weights / weights.clamp(max=1.0)).mean(), loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixing", [0.0, 0.1, 0.5, 1.0])
def test_jsd_is_trls_on_given_responses(mixing: float) -> None:
    theirs = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    draw = torch.Generator().manual_seed(0)
    hidden, weight, teacher_hidden, teacher_weight = (torch.randn(*s, generator=draw) for s in ((6, 4), (31, 4)) * 2)
    wanted = theirs(hidden @ weight.T, teacher_hidden @ teacher_weight.T, beta=mixing, temperature=0.9)
    key = JSD(mixing=mixing, temperature=0.9).divergence
    found = linear_joint(
        *(hidden, weight, teacher_hidden, teacher_weight),
        outputs=(key.output,),
        beta=key.beta,
        temperature=key.temperature,
    )
    # Theirs is divided by the rows of the batch.
    torch.testing.assert_close(found[key.output].sum() / 6, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpos_contrast_and_orpos_odds_are_trls(smoothing: float) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer.cpo_loss
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer.odds_ratio_loss
    of_them = SimpleNamespace(
        beta=0.3,
        alpha=0.0,
        loss_type="sigmoid",
        label_smoothing=smoothing,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    logps, lengths = -20 * torch.rand(8, generator=torch.Generator().manual_seed(0)), torch.arange(1, 9)
    policy = PolicyNumbers(logps, lengths)
    contrast, chosen, rejected = cpo(of_them, *logps.chunk(2))
    found = CPO(beta=0.3, label_smoothing=smoothing, likelihood_weight=0.0).loss(policy, Scores(), None)  # type: ignore[arg-type]
    torch.testing.assert_close(found.losses, contrast, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.margins, chosen - rejected, rtol=1e-5, atol=1e-5)
    odds = orpo(of_them, *policy.means.chunk(2))[0]
    found = ORPO(beta=0.3, likelihood_weight=0.0).loss(policy, Scores(), None)  # type: ignore[arg-type]
    torch.testing.assert_close(found.losses, -odds, rtol=1e-5, atol=1e-5)
