"""Rewards of responses by sequence-classification models: scored once, kept beside other scores, and trained on."""

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed import losses
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from tvkd_fast.commands.plan import plan
from tvkd_fast.commands.score import ScoreConfig, score
from tvkd_fast.data import tokenize_pair
from tvkd_fast.data.data_config import load_dataset
from tvkd_fast.models import load_tokenizer
from tvkd_fast.scoring import describe, reward_folder
from tvkd_fast.scoring.reward_folder import load_rewards, read_reward_manifest
from tvkd_fast.scoring.reward_model import RewardModel, load_reward_model, rewards_of

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}


@pytest.fixture
def reward_model(tmp_path: Path, chatml: Any, templateless: Any) -> Callable[..., str]:
    """Folders of tiny reward models, by name; with `own` in a tokenizer of their own."""

    def make(name: str, *, seed: int = 0, labels: int = 1, own: bool = False, pad: int | None = None) -> str:
        tokenizer = templateless if own else chatml
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(tokenizer), **SIZES, num_labels=labels, pad_token_id=pad)
        folder = tmp_path / "reward_models" / name
        LlamaForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def scored(make_config: Any, files: Path) -> Callable[..., Path]:
    def make(*names: str, **changes: Any) -> Path:
        config = make_config()
        settings = {"output_dir": str(files / "scores"), "policy": config.policy, "data": config.data}
        settings |= {"reward_model": list(names), "pairs_per_shard": 7}
        score(ScoreConfig(**(settings | changes)), show_progress=False)
        return Path(str((settings | changes)["output_dir"]))

    return make


@pytest.mark.parametrize("own", [False, True])
def test_rewards_are_the_models_own_of_each_response_alone(
    own: bool, reward_model: Any, scored: Any, make_config: Any, write_jsonl: Callable[..., Path]
) -> None:
    name, config = reward_model("rm", own=own), make_config()
    if not own:
        rows = [
            {
                "prompt": [{"role": "user", "content": f"Say {i}."}],
                "chosen": [{"role": "assistant", "content": f"{i}" * (1 + i % 3)}],
                "rejected": [{"role": "assistant", "content": "No."}],
            }
            for i in range(9)
        ]
        config.data.train = str(write_jsonl(rows, "conversations.jsonl"))
    folder = scored(name, data=config.data)
    ours, theirs = load_tokenizer(config.policy), load_tokenizer(name)
    dataset = load_dataset("train", config.data, ours)
    found = load_rewards(folder, dataset, ["rm"])
    assert found.shape == (1, len(dataset), 2)
    model = AutoModelForSequenceClassification.from_pretrained(name).double()
    for i in (0, 5, len(dataset) - 1):
        text = dataset.texts[i]
        for side, answer in enumerate((text.chosen, text.rejected)):
            if own:
                pair = tokenize_pair(text, theirs)
                ids = pair.prompt_ids + (pair.chosen_ids, pair.rejected_ids)[side]
            else:
                ids = theirs.apply_chat_template([*text.prompt, *answer], return_dict=False)
                # What the template writes behind the end of the turn is no part of a response.
                while ids[-1] != theirs.eos_token_id:
                    ids = ids[:-1]
            wanted = model(input_ids=torch.tensor([ids])).logits[0, 0]
            assert float(found[0, i, side]) == pytest.approx(float(wanted.detach()), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("pad", [None, 3, 260])
def test_batches_do_not_change_a_reward(pad: int | None, reward_model: Any) -> None:
    """A padding token that sequences hold, 3, one that they do not, and none."""
    model = load_reward_model(reward_model("rm", pad=pad)).double()
    draw = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 200, (n,), generator=draw).tolist() for n in (5, 2, 9, 5, 5, 1)]
    sequences[3][-1] = 3
    alone = torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0].detach() for row in sequences])
    for tokens in (1, 12, 1000):
        torch.testing.assert_close(rewards_of(model, sequences, tokens=tokens), alone.float(), rtol=1e-6, atol=1e-6)


def test_models_are_added_and_nothing_is_scored_twice(
    reward_model: Any, scored: Any, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, of = [], RewardModel.rewards
    monkeypatch.setattr(RewardModel, "rewards", lambda self, pairs: calls.append(len(pairs)) or of(self, pairs))
    one, two = reward_model("one"), reward_model("two", seed=1)
    folder = scored(one)
    manifest = read_reward_manifest(folder)
    assert manifest is not None
    assert manifest.names == ["one"]
    assert sum(calls) == manifest.pairs
    # A shard that is torn, and those behind it, are computed again.
    (folder / reward_folder.REWARDS / manifest.members[0].shards[-1].file).write_bytes(b"")
    calls.clear()
    scored(one, two)
    assert sum(calls) == manifest.members[0].shards[-1].pairs + manifest.pairs
    calls.clear()
    scored(two, one, teacher=model_folder(seed=1))
    assert calls == []
    manifest = read_reward_manifest(folder)
    assert manifest is not None
    assert manifest.names == ["one", "two"]
    assert f"rewards           one of {manifest.pairs} pairs, two of {manifest.pairs} pairs" in describe(folder)


def test_a_model_under_another_name_is_asked_for_by_it(
    reward_model: Any, scored: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = reward_model("rm-v1"), reward_model("rm-v2", seed=1)
    folder = scored(first, other)
    dataset = load_dataset("train", make_config().data, load_tokenizer(make_config().policy))
    before = load_rewards(folder, dataset, ["rm-v1", "rm-v2"])
    monkeypatch.setattr(RewardModel, "rewards", None)
    Path(other).rename(Path(other).with_name("aside"))
    Path(first).rename(other)
    Path(other).with_name("aside").rename(first)
    scored(first, other)
    assert torch.equal(load_rewards(folder, dataset, ["rm-v2", "rm-v1"]), before)
    best = Path(other).rename(Path(other).with_name("rm-best"))
    scored(str(best))
    manifest = read_reward_manifest(folder)
    assert manifest is not None
    assert manifest.names == ["rm-best", "rm-v1"]
    assert torch.equal(load_rewards(folder, dataset, ["rm-best", "rm-v1"]), before)


def test_models_are_in_memory_one_at_a_time(
    reward_model: Any, scored: Any, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, loaded = RewardModel.rewards, weakref.WeakSet()  # type: ignore[var-annotated]
    init, alive = PreTrainedModel.__init__, []

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        loaded.add(self)

    def noted(self: RewardModel, pairs: Any) -> Any:
        gc.collect()
        # Of a model and its trunk, the one that is whole.
        alive.append(sum("For" in type(x).__name__ for x in loaded))
        return of(self, pairs)

    one, two, teacher = reward_model("one"), reward_model("two", seed=1), model_folder(seed=1)
    monkeypatch.setattr(PreTrainedModel, "__init__", made)
    monkeypatch.setattr(RewardModel, "rewards", noted)
    scored(one, two, teacher=teacher)
    assert set(alive) == {1}


def test_one_model_under_two_names_is_refused(reward_model: Any, scored: Any) -> None:
    with pytest.raises(ValueError, match="one and two are one model: give --reward_model one of them"):
        scored(reward_model("one"), reward_model("two"))


def test_rewards_that_cannot_be_read_are_not_thrown_away(reward_model: Any, scored: Any) -> None:
    model = reward_model("rm")
    place = scored(model) / reward_folder.REWARDS
    manifest, files = place / "manifest.json", sorted(place.glob("*.safetensors"))
    text = manifest.read_text()
    for damaged, why in ((text.replace('"format": 1', '"format": 2'), "is of format 2"), (text[:-9], "is damaged")):
        manifest.write_text(damaged)
        with pytest.raises(ValueError, match=rf"{why}.* delete {place} to score anew"):
            scored(model)
        assert sorted(place.glob("*.safetensors")) == files


def test_damaged_rewards_are_named(reward_model: Any, scored: Any) -> None:
    folder = scored(reward_model("rm"))
    file = max((folder / reward_folder.REWARDS).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"a file of rm's rewards in .* does not match its checksum"):
        describe(folder)


def test_rewards_stay_with_their_data_alone(reward_model: Any, scored: Any, model_folder: Any) -> None:
    folder = scored(reward_model("rm"))
    scored(teacher=model_folder(seed=1))
    assert (folder / reward_folder.REWARDS).exists()
    scored(which="eval")
    assert not (folder / reward_folder.REWARDS).exists()


def test_a_full_disk_is_named(reward_model: Any, scored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write, model = reward_folder.write_whole, reward_model("rm")

    def full(path: Path, text: str) -> None:
        if '"file"' in text:
            raise OSError(28, "No space left on device")
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(reward_folder, "write_whole", full)
        with pytest.raises(ValueError, match=r"could not save rewards to .*No space left.* run it again to resume"):
            scored(model)
    scored(model)


def test_an_ensemble_is_trained_on_as_columns_are(
    reward_model: Any, scored: Any, make_config: Any, run: Any, files: Path
) -> None:
    folder = scored(reward_model("one"), reward_model("two", seed=1))
    held_out = scored(reward_model("one"), reward_model("two", seed=1), which="eval", output_dir=str(files / "eval"))
    config = make_config(objective="e_dpo", teacher=None, scores=str(folder), eval_scores=str(held_out), max_steps=3)
    config = replace(config, eval_every=3)
    figures = run(config)
    assert figures.loss is not None
    assert "e_dpo" in plan(config)
    for which in ("train", "eval"):
        source = Path(getattr(config.data, which))
        dataset = load_dataset(which, config.data, load_tokenizer(config.policy))  # type: ignore[arg-type]
        rewards = load_rewards(folder if which == "train" else held_out, dataset, ["one", "two"])
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        for k, name in enumerate(("one", "two")):
            for side, answer in enumerate(("chosen", "rejected")):
                for i, row in enumerate(rows):
                    row[f"{name}_{answer}"] = float(rewards[k, i, side])
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = replace(
        config,
        scores=None,
        eval_scores=None,
        output_dir=str(files / "columns"),
        data=replace(config.data, rewards=["one", "two"]),
    )
    assert run(columns).loss == pytest.approx(figures.loss, rel=1e-6)
    assert losses(config) == pytest.approx(losses(columns), rel=1e-6)


def test_what_a_folder_lacks_is_named(reward_model: Any, scored: Any, make_config: Any, run: Any) -> None:
    folder = scored(reward_model("one"), reward_model("two", seed=1))
    config = make_config(objective="e_dpo", teacher=None, scores=str(folder))
    with pytest.raises(ValueError, match=r"holds rewards of one, two and not of three: add them by `tvkd score"):
        run(replace(config, data=replace(config.data, rewards=["one", "two", "three"])))
    single = make_config(objective="d_dpo", teacher=None, scores=str(folder))
    with pytest.raises(ValueError, match=r"d_dpo reads one reward and .* holds 2: name one, --data.rewards \[one\]"):
        run(single)
    with pytest.raises(ValueError, match=r"missing reward columns.*tvkd score --reward_model"):
        run(make_config(objective="d_dpo", teacher=None))


def test_a_model_that_gives_no_reward_is_refused(
    reward_model: Any,
    scored: Any,
    model_folder: Any,
    make_config: Any,
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="has 3 labels, and a reward is one number"):
        scored(reward_model("three", labels=3))
    with pytest.raises(ValueError, match=r"is no reward model: its files lack score.weight"):
        scored(model_folder())
    with pytest.raises(ValueError, match="two reward models are called rm"):
        scored("a/rm", "b/rm")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing"):
        scored(str(tmp_path / "nothing"))
    model = reward_model("rm")
    monkeypatch.setattr(RewardModel, "rewards", lambda self, pairs: torch.full((len(pairs), 2), torch.nan))
    with pytest.raises(ValueError, match=r"row 0 by rm is NaN or inf, and of 7 of these 7 pairs: try --model.dtype"):
        scored(model)
    monkeypatch.setattr(RewardModel, "rewards", lambda self, pairs: torch.ones(len(pairs), 2))
    folder = scored(model)
    with pytest.raises(ValueError, match=r"row 0: both answers have the same reward .rm 1."):
        run(make_config(objective="d_dpo", teacher=None, scores=str(folder)))
