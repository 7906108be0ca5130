"""TVKDTrainer beside TRL's own DPOTrainer, and beside this project's trainer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'tvkd_fast[trl]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'tvkd_fast[lora]'")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tvkd_fast.integrations.trl import RETURNS, TVKDConfig, TVKDTrainer
from tvkd_fast.ops import known

OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "learning_rate": 1e-3,
    "max_steps": 5,
    "max_length": 40,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


WORDS = ["red", "green", "blue", "sun", "moon", "sea", "tree", "ab", "bread", "stone"]


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"{i}: say {WORDS[i % 10]}.",
            "chosen": f" {WORDS[i % 10]}",
            "rejected": f" {WORDS[(i * 7 + 3) % 10]}" * (1 + i % 3) + " no",
        }
        for i in range(start, start + count)
    ]


class Shifted(DPOTrainer):
    """Return TRL's own trainer over existing reference columns."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset


@pytest.fixture
def make(tmp_path: Path, folders: tuple[str, str]) -> Callable[..., Any]:
    """A trainer over 16 pairs; keywords of its config or of itself."""

    def trainer(kind: type, data: Dataset | None = None, **changes: Any) -> Any:
        config = TVKDConfig if kind is TVKDTrainer else DPOConfig
        given = {
            name: changes.pop(name)
            for name in ("teacher_model", "teacher_reference", "peft_config", "eval_dataset")
            if name in changes
        }
        model = AutoModelForCausalLM.from_pretrained(folders[0])
        return kind(
            model=model,
            args=config(output_dir=str(tmp_path / kind.__name__), **OPTIONS | changes),
            train_dataset=Dataset.from_list(pairs(16)) if data is None else data,
            processing_class=AutoTokenizer.from_pretrained(folders[0]),
            **given,
        )

    return trainer


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def same(ours: list[dict[str, float]], theirs: list[dict[str, float]], keys: tuple[str, ...]) -> None:
    assert len(ours) == len(theirs) > 0
    for step, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        for key in keys:
            # The policy still is its reference: every reward is 0, and which one is larger is rounding.
            if step == 0 and key == "rewards/accuracies":
                continue
            # TRL's log keeps that many digits.
            assert got[key] == pytest.approx(want[key], rel=2e-4, abs=2e-4), key


REWARDS = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins"))


@pytest.mark.each_once("e2e")
@pytest.mark.parametrize("changes", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("head", ["tvkd", "trl"])
def test_without_shaping_it_is_dpo(make: Callable[..., Any], folders: tuple[str, str], head: str, changes: Any) -> None:
    ours = make(TVKDTrainer, teacher_model=folders[1], alpha=0.0, fused_head=head, **changes)
    same(history(ours), history(make(DPOTrainer, **changes)), ("loss", "grad_norm", "logps/chosen", *REWARDS))


@pytest.mark.each_once("e2e")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_smoothing": 0.1, "gamma": 0.9},
        {"loss_type": ["ipo"], "terminal": "eos"},
        {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.5]},
        {"value_from": "logprobs", "kappa": 0.7, "alpha": -2.0},
    ],
)
@pytest.mark.parametrize("precomputed", [True, False])
def test_shaping_is_a_shift_of_the_reference(
    make: Callable[..., Any], folders: tuple[str, str], changes: dict[str, Any], precomputed: bool
) -> None:
    alpha = changes.get("alpha", 1.0)
    ours = make(
        TVKDTrainer,
        teacher_model=folders[1],
        value_scale=50.0,
        precompute_ref_log_probs=True,
        precompute_teacher=precomputed,
        **changes,
    )
    data = ours.train_dataset
    if not precomputed:
        kept = make(TVKDTrainer, teacher_model=folders[1], value_scale=50.0, precompute_ref_log_probs=True, **changes)
        data = kept.train_dataset
    moved = data.map(
        lambda row: {
            f"ref_{which}_logps": row[f"ref_{which}_logps"] + alpha * row[f"psi_{which}"] / 0.1
            for which in ("chosen", "rejected")
        }
    ).remove_columns(list(RETURNS))
    # As large as a reward: a shift that was lost would show.
    assert torch.tensor(data["psi_chosen"]).std() > 0.1
    own = ("alpha", "gamma", "terminal", "kappa", "value_from")
    theirs = make(
        Shifted, data=moved, precompute_ref_log_probs=True, **{k: v for k, v in changes.items() if k not in own}
    )
    found = history(ours)
    same(found, history(theirs), ("loss", "grad_norm", "logps/chosen"))
    shifts = alpha * (torch.tensor(data["psi_chosen"]) - torch.tensor(data["psi_rejected"])).mean()
    assert found[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    # Of four steps of four, every pair once.
    assert sum(line["tvkd/shaping_margins"] for line in found[:4]) / 4 == pytest.approx(
        float(shifts), rel=1e-3, abs=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "in_forward"), [({}, True), ({"loss_type": ["ipo"]}, False), ({"grad_mode": "sparse"}, False)]
)
def test_the_head_makes_its_gradient_as_it_answers(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[..., Any],
    folders: tuple[str, str],
    changes: dict[str, Any],
    in_forward: bool,
) -> None:
    made: list[Any] = []
    forward = known.forward_gradients

    def watched(*args: Any, **options: Any) -> Any:
        made.append(forward(*args, **options))
        return made[-1]

    monkeypatch.setattr(known, "forward_gradients", watched)

    def again(*_: Any) -> None:
        raise AssertionError("logits were computed again")

    monkeypatch.setattr(known, "gradients_op", again)
    trainer = make(TVKDTrainer, teacher_model=folders[1], max_steps=2, gradient_accumulation_steps=2, **changes)
    trainer.train()
    assert len(made) == (4 if in_forward else 0)


def test_it_is_what_this_projects_own_trainer_computes(
    make: Callable[..., Any], folders: tuple[str, str], tmp_path: Path
) -> None:
    from tvkd_fast.commands.train import train
    from tvkd_fast.data.data_config import DataConfig
    from tvkd_fast.models.settings import ModelConfig
    from tvkd_fast.objectives.tvkd import TVKD
    from tvkd_fast.training.metrics import read_metrics
    from tvkd_fast.training.optim import OptimConfig
    from tvkd_fast.training.train_config import TrainConfig

    rows = pairs(8)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        policy=folders[0],
        teacher=folders[1],
        output_dir=str(tmp_path / "own"),
        data=DataConfig(train=str(tmp_path / "pairs.jsonl"), max_length=40),
        loss=TVKD(beta=0.1, gamma=0.9, value_scale=20.0),
        optim=OptimConfig(lr=1e-3, clip_norm=1.0, final_lr_ratio=1.0),
        model=ModelConfig(packing="shared"),
        pairs_per_step=8,
        max_steps=4,
        log_every=1,
    )
    train(config, show_progress=False)
    own = read_metrics(tmp_path / "own" / "metrics.jsonl")
    # All pairs in every step, so that their order is of no account.
    ours = make(
        TVKDTrainer,
        data=Dataset.from_list(rows),
        teacher_model=folders[1],
        gamma=0.9,
        value_scale=20.0,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        max_steps=4,
    )
    losses: list[float] = []
    step = ours.training_step
    ours.training_step = lambda *given, **named: losses.append(float(out := step(*given, **named))) or out
    ours.train()
    assert losses == pytest.approx([line["loss"] for line in own], rel=1e-5)


@pytest.fixture
def scored(tmp_path: Path, folders: tuple[str, str]) -> Callable[..., str]:
    """A folder of what the teacher says of rows, by `tvkd score`."""
    from tvkd_fast.commands.score import ScoreConfig, score
    from tvkd_fast.data.data_config import DataConfig

    def make_scores(rows: list[dict[str, str]], *, max_length: int = 40, **changes: Any) -> str:
        folder = tmp_path / f"scores-{len(list(tmp_path.glob('scores-*.jsonl')))}"
        folder.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(train=f"{folder}.jsonl", max_length=max_length)
        options = {"teacher": folders[1]} | changes
        score(ScoreConfig(output_dir=str(folder), policy=folders[0], data=data, **options), show_progress=False)
        return str(folder)

    return make_scores


@pytest.mark.each_once("e2e")
@pytest.mark.parametrize("changes", [{}, {"kappa": 0.7, "value_from": "logprobs"}, {"max_length": 18, "gamma": 0.9}])
def test_scores_on_disk_are_the_teacher(
    make: Callable[..., Any], folders: tuple[str, str], scored: Callable[..., str], changes: dict[str, Any]
) -> None:
    held_out = pairs(5, 100)
    kept = {name: changes[name] for name in ("kappa", "max_length") if name in changes}
    cached = [scored(pairs(16), **kept), scored(held_out, **kept)]
    options = {"value_scale": 20.0, "eval_dataset": Dataset.from_list(held_out), **changes}
    theirs = make(TVKDTrainer, teacher_model=folders[1], **options)
    ours = make(TVKDTrainer, teacher_model=cached, **options)
    for name in RETURNS:
        for a, b in ((ours.train_dataset, theirs.train_dataset), (ours.eval_dataset, theirs.eval_dataset)):
            assert a[name] == pytest.approx(b[name], abs=1e-4)
    same(history(ours), history(theirs), ("loss", "grad_norm"))


def test_scores_of_a_teachers_rewards(make: Callable[..., Any], folders: tuple[str, str], scored: Any) -> None:
    kept = scored(pairs(16), teacher_reference=folders[0])
    options = {"value_from": "implicit_reward", "value_scale": 1.0}
    ours = make(TVKDTrainer, teacher_model=kept, **options)
    theirs = make(TVKDTrainer, teacher_model=folders[1], teacher_reference=folders[0], **options)
    assert ours.train_dataset["psi_chosen"] == pytest.approx(theirs.train_dataset["psi_chosen"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kappa": 0.7}, "made with kappa=1, not 0.7"),
        ({"value_from": "implicit_reward"}, "run `tvkd score` with --teacher_reference"),
        (
            {"max_length": 12},
            r"none of .* was made of these .*\(row \d+ is the first that differs",
        ),
        ({"precompute_teacher": False}, "leave precompute_teacher True"),
        ({"truncation_mode": "keep_end"}, "set truncation_mode='keep_start'"),
        (
            {"eval_dataset": Dataset.from_list(pairs(4, 50))},
            r"\(row 0 is the first that differs from .*give every dataset's folder",
        ),
        (
            {"eval_dataset": Dataset.from_list(pairs(9))},
            r"holds 16 pairs, of which the first 9 are the same\).*give every dataset's folder",
        ),
    ],
)
def test_scores_of_something_else_are_refused(
    make: Callable[..., Any], scored: Callable[..., str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(TVKDTrainer, teacher_model=scored(pairs(16)), **changes)


def test_scores_without_a_teacher_and_folders_that_are_none(
    make: Callable[..., Any], folders: tuple[str, str], scored: Callable[..., str]
) -> None:
    with pytest.raises(ValueError, match="holds no teacher's numbers"):
        make(TVKDTrainer, teacher_model=scored(pairs(16), teacher=None))
    with pytest.raises(ValueError, match="is no folder that `tvkd score` wrote"):
        make(TVKDTrainer, teacher_model=[scored(pairs(16)), folders[1]])


@pytest.mark.parametrize("teacher", [[], 7, ["a", None]])
def test_what_is_no_teacher_is_refused(make: Callable[..., Any], teacher: Any) -> None:
    with pytest.raises(ValueError, match=r"teacher_model is or holds [\w ,]+: give a model, its name, a folder"):
        make(TVKDTrainer, teacher_model=teacher)


def test_a_module_that_is_no_model_is_named_and_not_printed(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"teacher_model is a Linear, .* merge_and_unload"):
        make(TVKDTrainer, teacher_model=torch.nn.Linear(2, 2))


def test_a_list_of_models_is_refused(make: Callable[..., Any], folders: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="a model is given by itself"):
        make(TVKDTrainer, teacher_model=[folders[1]])


def test_a_teacher_and_its_scores_may_be_paths(
    make: Callable[..., Any], folders: tuple[str, str], scored: Callable[..., str]
) -> None:
    ours = make(TVKDTrainer, teacher_model=Path(scored(pairs(16))))
    theirs = make(TVKDTrainer, teacher_model=Path(folders[1]))
    assert ours.train_dataset["psi_chosen"] == pytest.approx(theirs.train_dataset["psi_chosen"], abs=1e-4)
    rewards = {"value_from": "implicit_reward", "teacher_reference": Path(folders[0])}
    assert make(TVKDTrainer, teacher_model=Path(folders[1]), **rewards).train_dataset["psi_chosen"]


def test_scores_of_two_teachers_are_distinguished(
    make: Callable[..., Any], folders: tuple[str, str], scored: Callable[..., str]
) -> None:
    ours, held_out = scored(pairs(16)), pairs(5, 100)
    with pytest.raises(ValueError, match="were made of the same pairs: give one of them"):
        make(TVKDTrainer, teacher_model=[ours, scored(pairs(16), teacher=folders[0])])
    with pytest.raises(ValueError, match="are of two teachers"):
        make(
            TVKDTrainer,
            teacher_model=[ours, scored(held_out, teacher=folders[0])],
            eval_dataset=Dataset.from_list(held_out),
        )


def test_adapters_dict_evaluations_and_a_resumed_run(make: Callable[..., Any], folders: tuple[str, str]) -> None:
    changes = {
        "teacher_model": folders[1],
        "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "eval_dataset": {"a": Dataset.from_list(pairs(5, 100)), "b": Dataset.from_list(pairs(3, 200))},
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 5,
    }
    whole = make(TVKDTrainer, **changes)
    found = history(whole)
    for name in "ab":
        (line,) = (line for line in whole.state.log_history if f"eval_{name}_loss" in line)
        assert {"eval_rewards/margins", "eval_tvkd/shaping_margins"} <= line.keys()
    assert "entropy" not in found[0]
    again = make(TVKDTrainer, **changes)
    again.train(resume_from_checkpoint=str(Path(again.args.output_dir) / "checkpoint-3"))
    resumed = [line for line in again.state.log_history if "loss" in line]
    same(resumed[-2:], found[-2:], ("loss", "grad_norm"))


def test_a_sparse_head_says_what_it_kept(make: Callable[..., Any], folders: tuple[str, str]) -> None:
    """Test a tiny model, whose rows are all too flat: they are computed exactly, and counted."""
    sparse = history(make(TVKDTrainer, teacher_model=folders[1], grad_mode="sparse"))
    assert [line["tvkd/head_dense_rows"] for line in sparse] == [1.0] * 5
    same(sparse, history(make(TVKDTrainer, teacher_model=folders[1])), ("loss", "grad_norm"))


def test_a_checkpoint_says_what_made_it(make: Callable[..., Any], folders: tuple[str, str]) -> None:
    trainer = make(TVKDTrainer, teacher_model=folders[1], max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "- tvkd" in card
    assert "2509.16965" in card


def test_an_implicit_reward_is_the_teachers_own_margin(make: Callable[..., Any], folders: tuple[str, str]) -> None:
    """Test that at γ=1 Ψ is the teacher's gain over its reference, up to the last content state."""
    options = {"value_from": "implicit_reward", "value_scale": 1.0, "terminal": "eos"}
    ours = make(TVKDTrainer, teacher_model=folders[1], teacher_reference=folders[0], **options)
    row = ours.train_dataset[0]
    teacher, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in reversed(folders))
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
    begin = len(row["prompt_ids"])

    def logp(model: Any) -> torch.Tensor:
        found = model(ids).logits.double().log_softmax(-1)[0, begin - 1 : -1]
        return found.gather(1, ids[0, begin:, None]).sum()

    with torch.no_grad():
        assert row["psi_chosen"] == pytest.approx(float(logp(teacher) - logp(reference)), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": ["apo_zero"]}, "apo_zero sees more of a pair than its margin"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type='reverse_kl'"),
        ({"ld_alpha": 0.5}, "leave ld_alpha out"),
        ({"use_weighting": True}, "set fused_head='trl'"),
        ({"value_from": "implicit_reward"}, "give teacher_reference with it"),
        ({"value_from": "logprobs"}, "set kappa to another value"),
        ({"gamma": 2.0}, "gamma must be in"),
        ({"fused_head": "trl", "grad_mode": "sparse"}, "set fused_head='tvkd'"),
    ],
)
def test_what_it_cannot_is_refused_by_name(
    make: Callable[..., Any], folders: tuple[str, str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(TVKDTrainer, teacher_model=folders[1], **changes)


def test_a_teacher_with_another_tokenizer_is_refused(
    make: Callable[..., Any], model_folder: Callable[..., str], chatml: Any, train_tokenizer: Any
) -> None:
    other = model_folder(seed=2, tokenizer=train_tokenizer(["some other text, and more of it"]))
    with pytest.raises(ValueError, match="another tokenizer than the policy: give teacher_model the folder"):
        make(TVKDTrainer, teacher_model=other)


def test_new_data_after_the_teacher_was_let_go(make: Callable[..., Any], folders: tuple[str, str]) -> None:
    gone = make(TVKDTrainer, teacher_model=folders[1])
    with pytest.raises(ValueError, match="pass teacher_model as a module"):
        gone.evaluate(Dataset.from_list(pairs(3, 300)))
    held = make(TVKDTrainer, teacher_model=AutoModelForCausalLM.from_pretrained(folders[1]))
    assert "eval_tvkd/shaping_margins" in held.evaluate(Dataset.from_list(pairs(3, 300)))
