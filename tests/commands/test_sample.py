"""`tvkd sample`: rows that train and score read, resumed after a kill, and its refusals."""

import json
from dataclasses import replace

import pytest
import torch

from tvkd_fast.cli.main import main
from tvkd_fast.commands import sample as command
from tvkd_fast.commands.sample import SampleConfig, sample
from tvkd_fast.data import build_dataset
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.data.reading.formats import to_response
from tvkd_fast.data.reading.sample_folder import SAMPLES
from tvkd_fast.files import unfinished
from tvkd_fast.models import load_tokenizer

WORDS = ["red", "green", "blue", "sun", "moon", "sea"]


@pytest.fixture
def prompts(write_jsonl):
    return str(write_jsonl([{"prompt": [{"role": "user", "content": f"say {w}"}]} for w in WORDS], "prompts.jsonl"))


@pytest.fixture
def make(tmp_path, prompts, model_folder):
    """A pass of a tiny model over six prompts; `data_` fields may be changed."""
    policy = model_folder(seed=0)

    def config(**changes):
        data = {name[5:]: changes.pop(name) for name in list(changes) if name.startswith("data_")}
        given = {"policy": policy, "output_dir": str(tmp_path / "out"), "max_new_tokens": 8, "prompts_per_shard": 4}
        return SampleConfig(**given | changes, data=DataConfig(**{"train": prompts} | data))

    return config


def rows_of(folder):
    return [json.loads(line) for file in sorted(folder.glob("samples-*.jsonl")) for line in file.open()]


def quiet(config):
    return sample(config, show_progress=False)


def test_responses_are_rows_that_sft_reads_in_their_own_tokens(make, tmp_path, model_folder, capsys):
    sampled = quiet(make(n=2))
    rows = rows_of(tmp_path / "out")
    assert len(rows) == sampled.rows == 12 - sampled.left_out.total()
    counts = sampled.counts("policy")
    assert counts.samples == 12
    assert counts.tokens == sum(len(row["completion_ids"]) for row in rows) + sampled.left_out["empty"]
    assert {row["source"] for row in rows} <= {f"prompts.jsonl row {i}" for i in range(6)}
    tokenizer = load_tokenizer(make().policy)
    dataset = build_dataset(str(tmp_path / "out"), tokenizer, read=to_response)
    for pair, row in zip(dataset, rows, strict=True):
        assert (pair.prompt_ids, pair.chosen_ids) == (row["prompt_ids"], row["completion_ids"])
        assert pair.chosen_ended == row["completion_ended"]
        assert (pair.rejected_ids, pair.rejected_ended) == ([], False)
        assert len(row["completion_logps"]) == len(row["completion_ids"])
    assert dataset.report.sampled == len(rows)
    assert "in the tokens that they were sampled in" in str(dataset.report)
    train = ["train", "--policy", make().policy, "--data.train", str(tmp_path / "out"), "--max_steps", "1"]
    train += ["--pairs_per_step", "4", "--output_dir", str(tmp_path / "run")]
    main([*train, "--objective", "sft"])
    assert "final model" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*train, "--objective", "dpo"])
    assert "One response per row is for objectives that compare none" in capsys.readouterr().err


def test_another_tokenizer_reads_the_text(make, tmp_path, make_tokenizer):
    quiet(make())
    rows = rows_of(tmp_path / "out")
    other = make_tokenizer(eos="<|eot_id|>")
    dataset = build_dataset(str(tmp_path / "out"), other, read=to_response, bad_pairs="drop")
    assert dataset.report.sampled == 0
    assert all(pair.chosen_ended for pair in dataset)
    said = {row["completion"][0]["content"] for row in rows}
    assert {other.decode(pair.chosen_ids[:-1]) for pair in dataset} <= said | {text.strip() for text in said}


def test_pairs_of_two_models_are_chosen_and_rejected(make, tmp_path, model_folder, capsys):
    student = model_folder(seed=1)
    quiet(make(n=2, rejected_policy=student))
    rows = rows_of(tmp_path / "out")
    alone = {}
    for name, folder in (("chosen", make().policy), ("rejected", student)):
        quiet(make(n=2, policy=folder, output_dir=str(tmp_path / name)))
        alone[name] = {(row["source"], row["sample"]): row["completion_ids"] for row in rows_of(tmp_path / name)}
    assert rows
    for row in rows:
        for name in ("chosen", "rejected"):
            assert row[f"{name}_ids"] == alone[name][row["source"], row["sample"]]
    dataset = build_dataset(str(tmp_path / "out"), load_tokenizer(student))
    assert [pair.rejected_ids for pair in dataset] == [row["rejected_ids"] for row in rows]
    out = str(tmp_path / "out")
    main(["score", "--policy", student, "--data.train", out, "--output_dir", str(tmp_path / "scores")])
    assert f"scored {len(rows)} pairs" in capsys.readouterr().out


def test_models_of_two_tokenizers_leave_the_text(make, tmp_path, model_folder, make_tokenizer):
    student = model_folder(seed=1, tokenizer=make_tokenizer(eos="<|eot_id|>"))
    quiet(make(rejected_policy=student))
    assert not any(name.endswith("_ids") for row in rows_of(tmp_path / "out") for name in row)


def test_pairs_of_the_best_and_the_worst(make, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"knows the answers to bundled prompts alone: set --data bundled:train"):
        make(n=3, rank="judge")
    with pytest.raises(ValueError, match="best and the worst of 1 response"):
        make(n=1, rank="judge", data_train="bundled:eval:3")
    monkeypatch.setattr(command, "_reward", lambda text, response, tokenizer: float(sum(response.ids)))
    sampled = quiet(make(n=3, rank="judge", data_train="bundled:eval:3"))
    for row in rows_of(tmp_path / "out"):
        assert sum(row["chosen_ids"]) > sum(row["rejected_ids"])
    assert sampled.rows + sampled.left_out["prompt without a better and a worse response"] == 3
    monkeypatch.setattr(command, "_reward", lambda *given: 1.0)
    with pytest.raises(
        ValueError, match=r"no row is left of 9 responses .* 3 prompt without a better and a worse response"
    ):
        quiet(make(n=3, rank="judge", data_train="bundled:eval:3", output_dir=str(tmp_path / "alike")))


def test_a_killed_pass_resumes_and_nothing_half_made_is_seen(make, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    quiet(make(n=2, output_dir=str(whole), prompts_per_shard=2))
    calls = []
    rows = command._rows

    def killed(*given):
        calls.append(given[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rows(*given)

    monkeypatch.setattr(command, "_rows", killed)
    config = make(n=2, prompts_per_shard=2)
    with pytest.raises(KeyboardInterrupt):
        quiet(config)
    out = tmp_path / "out"
    assert not out.exists()
    torn = unfinished(out) / "samples-00001.jsonl"
    torn.write_text(torn.read_text()[:-9])
    calls[:] = [None] * 5
    quiet(config)
    assert calls[5:] == [range(2, 4), range(4, 6)]
    for file in sorted(whole.iterdir()):
        assert (out / file.name).read_bytes() == file.read_bytes()
    (out / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds other things than samples"):
        quiet(config)


def test_a_damaged_shard_is_refused(make, tmp_path):
    quiet(make())
    tokenizer = load_tokenizer(make().policy)
    file = tmp_path / "out" / "samples-00000.jsonl"
    file.write_text(file.read_text().replace("say", "sag"))
    with pytest.raises(ValueError, match=r"samples-00000.jsonl does not match its checksum"):
        build_dataset(str(tmp_path / "out"), tokenizer, read=to_response)
    (tmp_path / "out" / SAMPLES).write_text("{}")
    with pytest.raises(ValueError, match="is of format None, this library reads 1"):
        build_dataset(str(tmp_path / "out"), tokenizer, read=to_response)


def test_a_prompt_asked_again_is_answered_otherwise(make, tmp_path, write_jsonl, capsys):
    twice = str(write_jsonl([{"prompt": "say ab"}, {"prompt": "say ba"}, {"prompt": "say ab"}], "twice.jsonl"))
    sample(make(data_train=twice, max_new_tokens=16))
    assert "3 prompts of" in (seen := capsys.readouterr().err)
    assert "1 of them again, whose samples are further ones" in seen
    rows = {row["source"]: row["completion_ids"] for row in rows_of(tmp_path / "out")}
    assert rows["twice.jsonl row 0"] != rows["twice.jsonl row 2"]
    quiet(make(data_train=twice, max_new_tokens=16, n=2, output_dir=str(tmp_path / "two")))
    firsts = [row for row in rows_of(tmp_path / "two") if row["source"] == "twice.jsonl row 0"]
    assert firsts[1]["completion_ids"] == rows["twice.jsonl row 2"]


def test_what_leaves_no_room_is_refused_or_counted(make, model_folder, write_jsonl, capsys):
    rows = [{"prompt": "a " * 30}, {"prompt": "abc"}]
    long = {"policy": model_folder(max_position_embeddings=40), "data_train": str(write_jsonl(rows, "long.jsonl"))}
    with pytest.raises(
        ValueError, match=r"long.jsonl row 0: the prompt leaves no room for a response \(\d+ tokens, of 40"
    ):
        quiet(make(**long))
    sampled = sample(make(**long, data_overlong="drop", max_new_tokens=100))
    assert "1 dropped: the prompt leaves no room for a response" in capsys.readouterr().err
    assert sampled.counts("policy").longest <= 38
    with pytest.raises(ValueError, match="no prompt is left of 2"):
        quiet(make(**long, data_overlong="drop", data_max_length=2))


@pytest.fixture
def endless(make, tmp_path):
    """A policy whose ends are never likely."""
    from tvkd_fast.models import load_model, save_model

    model = load_model(make().policy)
    model.config.tie_word_embeddings = False
    weight = model.get_output_embeddings().weight.detach().clone()
    weight[:5] = 0
    weight[5:] *= 20
    model.lm_head.weight = torch.nn.Parameter(weight)
    save_model(model, load_tokenizer(make().policy), tmp_path / "endless")
    return str(tmp_path / "endless")


def test_a_policy_that_never_stops_is_said_to(make, endless, tmp_path):
    with pytest.warns(UserWarning, match=r"none of 6 responses stopped within 8 tokens: raise --max_new_tokens"):
        sampled = quiet(make(policy=endless))
    assert sampled.counts("policy").unfinished == 6
    assert not any(row["completion_ended"] for row in rows_of(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"no row is left of 6 responses .* 6 never stopped\. Raise --max_new_tokens"):
        quiet(make(policy=endless, unfinished="drop", output_dir=str(tmp_path / "dropped")))
    assert unfinished(tmp_path / "dropped").is_dir()


def test_equal_responses_make_no_pair(make, tmp_path):
    config = make(rejected_policy=make().policy, temperature=0.0)
    with pytest.raises(
        ValueError, match=r"no row is left of .* pair of equal responses.* --temperature or --n where they"
    ):
        quiet(config)


def test_the_command_says_what_it_did(make, tmp_path, capsys):
    arguments = ["sample", "--policy", make().policy, "--data", make().data.train, "--n", "2"]
    main([*arguments, "--output_dir", str(tmp_path / "out"), "--max_new_tokens", "6", "--top_p", "0.9"])
    said = capsys.readouterr()
    assert "12 responses of " in said.out
    assert "tokens/s" in said.out
    assert "never stopped" in said.out
    assert "not the policy's own law (top_p 0.9)" in said.out
    assert f"tvkd train --objective sft --data.train {tmp_path / 'out'}" in said.out
    assert all("completion_law_logps" in row for row in rows_of(tmp_path / "out"))
    for wrong, message in (
        (["--n", "0"], "n must be at least 1, got 0: set --n"),
        (["--n", "2", "--temperature", "0"], "all 2 responses would be the same"),
        (["--temperature", "-1"], "temperature must be at least 0"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments[:5], *wrong, "--output_dir", str(tmp_path / "o")])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments[:3], "--output_dir", str(tmp_path / "o")])
    assert "no prompts: set --data to" in capsys.readouterr().err


def test_samples_are_those_of_the_settings(make, tmp_path):
    quiet(make())
    first = rows_of(tmp_path / "out")
    quiet(replace(make(), tokens_at_once=40, prompts_per_shard=1))
    assert [row["completion_ids"] for row in rows_of(tmp_path / "out")] == [row["completion_ids"] for row in first]
    quiet(make(seed=1))
    assert [row["completion_ids"] for row in rows_of(tmp_path / "out")] != [row["completion_ids"] for row in first]
