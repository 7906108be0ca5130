"""The loop of an on-policy run: rollout, score, step; resume, metrics, refusals."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tvkd_fast.commands import prepare
from tvkd_fast.commands.refusals import check_run
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.objectives.mixtures.mixture import Mixture
from tvkd_fast.objectives.onpolicy.opd import OPD
from tvkd_fast.rollout import ModelSampler, RolloutConfig
from tvkd_fast.training.metrics import read_metrics

OF_BOTH = {"objective": "mixture", "loss_parts": [{"opd": {}}, {"sft": {}, "weight": 0.1}]}
CLOCK = {"tokens_per_s", "pairs_per_s", "data_wait", "peak_memory_gb"}


def lines(config):
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def weights(config):
    return load_file(Path(config.output_dir) / "final" / "model.safetensors")


def trained(line):
    """A line of metrics without what hangs on the clock, on this page's runs or on how many steps a run took."""
    return {k: v for k, v in line.items() if k not in CLOCK and not k.endswith(("_share", "/tokens_per_s"))}


@pytest.fixture
def on_policy(make_config):
    def make(**changes):
        defaults = {"objective": "opd", "max_steps": 4, "data_eval": None, "data_max_length": 40}
        settings = changes.pop("rollout", {})
        default = {"n": 2, "max_new_tokens": 6} if settings.get("share") != 0 else {}
        rollout = RolloutConfig(**default | settings)
        return replace(make_config(**defaults | changes), rollout=rollout)

    return make


@pytest.mark.parametrize("objective", ["opd", "opd_sampled"])
def test_the_policy_comes_nearer_to_its_teacher_on_its_own_samples(objective, on_policy, run, files):
    run(on_policy(objective=objective, max_steps=25, pairs_per_step=8, optim_lr=5e-3, rollout={"n": 4}))
    log = [line for line in lines(on_policy()) if "loss" in line]
    first, last = (sum(line["loss"] for line in part) / 5 for part in (log[:5], log[-5:]))
    assert last < 0.8 * first
    wanted = {"age", "length", "unfinished", "empty", "tokens_per_s"} | {
        f"{part}_share" for part in ("sampling", "scoring", "learning")
    }
    assert {name.removeprefix("rollout/") for name in log[0] if name.startswith("rollout/")} == wanted
    assert all(line["rollout/age"] == 0 and 1 <= line["rollout/length"] <= 6 for line in log)
    assert all(0 <= line["rollout/unfinished"] <= 1 for line in log)


@pytest.mark.parametrize(("every", "kept"), [(1, 2), (3, 4)])
def test_a_run_resumes_bit_for_bit_in_the_middle_of_its_samples(every, kept, on_policy, run, files):
    settings = {"max_steps": 6, "save_every": kept, "keep_checkpoints": 3, "rollout": {"every": every}}
    settings |= {"loss_lambda_": 1.25}
    whole = on_policy(output_dir=str(files / "whole"), **settings)
    cut = on_policy(output_dir=str(files / "cut"), **settings)
    run(whole)
    run(cut)
    shutil.rmtree(Path(cut.output_dir) / "checkpoints" / "step-000006")
    state = json.loads((Path(cut.output_dir) / "checkpoints" / f"step-{kept:06d}" / "state.json").read_text())
    assert ("rollout" in state) == (every > 1)
    run(cut)
    ours, theirs = weights(whole), weights(cut)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [trained(line) for line in lines(whole)] == [trained(line) for line in lines(cut)]


def test_samples_are_drawn_from_the_weights_of_the_moment(on_policy, run, monkeypatch):
    seen = []
    sample = ModelSampler.sample
    monkeypatch.setattr(
        ModelSampler,
        "sample",
        lambda self, *given, **more: (
            seen.append((more["step"], next(self.model.parameters()).detach().sum().item(), self.model.training))
            or sample(self, *given, **more)
        ),
    )
    run(on_policy(rollout={"every": 2}))
    assert [step for step, _, _ in seen] == [0, 2]
    assert seen[0][1] != seen[1][1]


def test_prompts_alone_are_data_enough(on_policy, run, files):
    rows = "".join(json.dumps({"prompt": f"{i}: say red."}) + "\n" for i in range(8))
    (files / "prompts.jsonl").write_text(rows)
    config = on_policy(max_steps=2)
    run(replace(config, data=DataConfig(train=str(files / "prompts.jsonl"), max_length=40)))
    assert [line["step"] for line in lines(config)] == [1, 2]


def test_gkd_mixes_samples_with_the_datas_responses(on_policy, run):
    config = on_policy(objective="jsd", max_steps=8, rollout={"share": 0.5, "temperature": 0.9})
    run(config)
    own = [config.rollout.samples(0.5, config.seed, step) for step in range(8)]
    assert ["rollout/age" in line for line in lines(config)] == own
    assert len(set(own)) == 2


def test_opd_takes_given_responses_where_nothing_is_sampled(on_policy, run):
    config = on_policy(rollout={"share": 0.0}, data_eval=on_policy().data.train, max_steps=2)
    evaluation = run(config)
    assert evaluation.loss > 0
    assert not any(name.startswith("rollout/") for line in lines(config) for name in line)


def test_held_out_pairs_are_evaluated_beside_samples(on_policy, run):
    assert run(on_policy(max_steps=1, data_eval=on_policy().data.train)).loss > 0
    # Its loss wants the sampler's log-probabilities, which held-out pairs have not.
    sampled = on_policy(objective="opd_sampled", max_steps=1, data_eval=on_policy().data.train)
    assert run(replace(sampled, resume=False)).loss is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"temperature": 0.7}}, "temperature 0.7 would bend it: set --rollout.temperature 1"),
        ({"rollout": {"temperature": 0.0, "n": 1}}, "temperature 0 would bend it"),
        ({"rollout": {"top_p": 0.9, "top_k": 5}}, "top_p 0.9 and top_k 5 would bend it"),
        ({"objective": "dpo", "rollout": {"share": 0.5}}, "dpo compares two responses"),
        ({"objective": "opd_sampled", "rollout": {"share": 0.5}}, "set --rollout.share 1, or choose opd"),
        ({"objective": "sft", "rollout": {"share": 1.0}}, r"sft reads no other model.*: leave --rollout.share out"),
        ({"objective": "forward_kl"}, r"rollout.n would be ignored: set --rollout.share above 0, or leave --rollout.n"),
        ({"rollout": {"share": 0.0, "temperature": 0.5}}, "rollout.temperature would be ignored: set --rollout.share"),
        (
            OF_BOTH | {"rollout": {"temperature": 0.7}},
            "mixture needs samples of the policy's own law, and temperature 0.7 would bend it",
        ),
        ({"scores": "scores"}, "leave --scores out and set --teacher"),
        ({"teacher": None}, "opd needs a teacher"),
    ],
)
def test_runs_that_cannot_sample_are_refused_before_they_begin(changes, message, on_policy):
    with pytest.raises(ValueError, match=message):
        check_run(on_policy(**changes))


def test_a_mixture_with_a_part_over_samples_is_over_samples(on_policy, run):
    config = on_policy(**OF_BOTH, max_steps=2)
    assert config.sampled_share == 1.0
    run(config)
    assert all(line["rollout/age"] == 0 for line in lines(config))
    assert replace(config, loss=Mixture(parts=[{"forward_kl": {}}, {"sft": {}}])).sampled_share == 0.0


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_teacher_of_another_tokenizer_is_refused_before_models_are_loaded(
    share, on_policy, run, model_folder, train_tokenizer, monkeypatch
):
    teacher = model_folder(seed=1, tokenizer=train_tokenizer(["say red green blue"] * 9), vocab_size=404)
    monkeypatch.setattr(prepare, "_policy", None)
    with pytest.raises(ValueError, match=r"another tokenizer \(they differ at .*: choose a teacher of the policy's"):
        run(on_policy(teacher=teacher, objective="jsd", rollout={"share": share}))


def test_a_step_that_is_not_finite_leaves_a_record_of_its_samples(on_policy, run, monkeypatch):
    drawn = []
    sample = ModelSampler.sample
    monkeypatch.setattr(
        ModelSampler, "sample", lambda *given, **more: drawn.append(sample(*given, **more)) or drawn[-1]
    )

    def broken(*given):
        out = loss(*given)
        return replace(out, losses=out.losses * (math.nan if len(drawn) == 2 else 1.0))

    loss = OPD.loss
    monkeypatch.setattr(OPD, "loss", broken)
    config = on_policy(log_every=4)
    with pytest.raises(FloatingPointError, match=r"step 2 .* holds the responses .* for them\. Lower --optim\.lr"):
        run(config)
    record = json.loads((Path(config.output_dir) / "nonfinite-step-000001.json").read_text())
    found = [list(map(int, one["ids"].split())) for one in record["samples"]]
    assert found == [one.ids for samples in drawn[1] for one in samples]
    assert sorted({one["pair"] for one in record["samples"]}) == record["pairs"]


def test_a_teacher_may_have_a_token_more(on_policy, run, model_folder, chatml):
    more = copy.deepcopy(chatml)
    more.add_tokens(["<more>"])
    settings = {"teacher": model_folder(seed=1, tokenizer=more), "data_eval": on_policy().data.train, "max_steps": 1}
    assert run(on_policy(**settings)).loss > 0
    plain = on_policy(**settings | {"teacher": model_folder(seed=1)}, output_dir=on_policy().output_dir + "-plain")
    run(plain)
    assert lines(on_policy())[0]["loss"] == lines(plain)[0]["loss"]


def test_another_law_is_taken_where_it_is_asked_for_by_name(on_policy):
    check_run(on_policy(rollout={"temperature": 0.7, "any_law": True}))
    check_run(on_policy(objective="jsd", rollout={"share": 1.0, "temperature": 0.9}))


def test_a_base_that_is_asked_for_and_missing_is_named(on_policy):
    with pytest.raises(ValueError, match="set --teacher_reference"):
        replace(on_policy(), loss=OPD(lambda_=1.25, base="teacher_reference"))


def test_a_prompt_without_room_for_a_response_is_refused_by_its_row(on_policy, run):
    with pytest.raises(ValueError, match=r"train.jsonl row 0: the prompt leaves no room for a response"):
        run(on_policy(data_max_length=5))


def test_another_way_of_sampling_is_another_run(on_policy, run):
    run(on_policy(max_steps=2))
    with pytest.raises(RuntimeError, match="made with another rollout"):
        run(on_policy(max_steps=2, rollout={"n": 3}))


def test_a_base_that_is_given_and_not_read_is_refused(on_policy):
    with pytest.raises(ValueError, match=r"or --loss\.base: set all or none"):
        replace(on_policy(), teacher_reference="base")
