import json

import pytest

from tvkd_fast.cli.main import main
from tvkd_fast.cli.parser import COMMANDS, load_recipe, recipes
from tvkd_fast.objectives.registry import objective_named, objectives


@pytest.fixture
def files(tmp_path, model_folder, write_jsonl):
    rows = [{"prompt": f"{i}: say ab.", "chosen": "ab", "rejected": "no no"} for i in range(12)]
    return {"data": str(write_jsonl(rows)), "policy": model_folder(seed=0), "teacher": model_folder(seed=1)}


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_four_commands_follow_each_other(files, tmp_path, capsys):
    run, scores = tmp_path / "run", tmp_path / "scores"
    models = ["--policy", files["policy"], "--teacher", files["teacher"]]
    main(["score", *models, "--data.train", files["data"], "--output_dir", str(scores)])
    assert "scored 12 pairs" in capsys.readouterr().out
    arguments = [
        "--max_steps",
        "2",
        "--pairs_per_step",
        "4",
        "--data.train",
        files["data"],
        "--data.eval",
        files["data"],
    ]
    capsys.readouterr()
    main(["scores", str(scores)])
    assert "response states, 1 shards" in capsys.readouterr().out
    main(["train", "--policy", files["policy"], "--scores", str(scores), "--output_dir", str(run), *arguments])
    assert f"final model: {run / 'final'}" in capsys.readouterr().out
    line = tmp_path / "eval.jsonl"
    main(
        [
            "eval",
            "--policy",
            str(run / "final"),
            "--reference",
            files["policy"],
            "--data.eval",
            files["data"],
            "--output",
            str(line),
        ]
    )
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed == json.loads(line.read_text())
    assert printed["pairs"] == 12
    assert {"accuracy", "margin", "reward_accuracy", "reward_margin"} <= printed.keys()


def test_yaml_gives_options_and_the_command_line_overrides_them(files, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"policy: {files['policy']}\nobjective: dpo\noutput_dir: {tmp_path / 'a'}\n"
        f"data:\n  train: {files['data']}\nloss:\n  beta: 0.3\nmax_steps: 5\npairs_per_step: 4\n"
    )
    main(
        [
            "train",
            "--config",
            str(config),
            "--max_steps",
            "1",
            "--optim.lr",
            "1e-4",
            "--output_dir",
            str(tmp_path / "b"),
        ]
    )
    state = json.loads((tmp_path / "b" / "checkpoints" / "step-000001" / "state.json").read_text())
    assert state["config"]["loss"]["beta"] == 0.3
    assert state["config"]["optim"]["lr"] == 1e-4
    assert state["config"]["max_steps"] == 1


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--loss.betta", "0.2"], "Did you mean --loss.beta?"),
        (["--output_di", "o"], "Did you mean --output_dir?"),
        (["--data.trian", "o"], "Did you mean --data.train?"),
        (["--polcy", "o"], "Did you mean --policy?"),
        (["--loss.beta", "much"], "--loss.beta wants a number, and got 'much'"),
        (["--max_steps", "two"], "--max_steps wants a whole number, and got 'two'"),
        (["--objective", "ppo"], f"--objective wants one of {', '.join(sorted(objectives()))}"),
        (["--learning_rate", "1e-5"], "Did you mean --optim.lr?"),
        (["--objective", "dppo"], "got 'dppo'. Did you mean dpo?"),
        (
            ["--objective=dpo", "--loss.gamma", "1"],
            "a setting of tvkd, and dpo has --loss.beta, --loss.",
        ),
        (["--objective", "sft", "--loss.beta", "1"], "and sft has none"),
        (["--objective", "robst"], "got 'robst'. Did you mean robust?"),
        (["--objective", "dadpo", "--loss.beta", "1"], "and dadpo has --loss.beta_ref, --loss.beta_teacher."),
        (["--objective", "dpo", "--loss.gap_scale", "1"], "a setting of m_dpo, and dpo has --loss.beta, --loss."),
        (["--per_device_train_batch_size=2"], "Did you mean --pairs_per_micro_batch?"),
    ],
)
def test_a_mistyped_option_is_refused_with_the_nearest_name(arguments, wanted, capsys):
    error = error_of(capsys, "train", "--policy", "p", "--output_dir", "o", *arguments)
    assert error.startswith("tvkd train: error: ")
    assert wanted in error
    assert "tvkd train --help" in error
    assert len(error.splitlines()) <= 4


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("loss: {betta: 0.2}", "Did you mean --loss.beta?"),
        ("outputdir: o", "Did you mean --output_dir?"),
        ("losss: {beta: 1}", "Did you mean --loss"),
    ],
)
def test_a_mistyped_key_in_yaml_is_refused_with_the_nearest_name(text, wanted, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"policy: p\noutput_dir: o\n{text}\n")
    assert wanted in error_of(capsys, "train", "--config", str(config))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--objective", "[{dppo: {}}]"], "got 'dppo'; did you mean dpo?"),
        (["--objective=[{dpo: {}, weight: 0}]"], "the weights of dpo sum to 0"),
        (["--objective", "[{sft: {beta: 1}}]"], "beta is no setting of sft, which has none"),
    ],
)
def test_what_is_no_mixture_is_refused_in_a_line(arguments, wanted, capsys):
    error = error_of(capsys, "train", "--policy", "p", "--output_dir", "o", *arguments)
    assert error.startswith("tvkd train: error: ")
    assert wanted in error
    assert len(error.splitlines()) == 1


def test_a_list_for_an_objective_is_a_mixture_in_yaml_and_on_the_command_line(files, tmp_path, capsys):
    parts = [{"dpo": {"beta": 0.3}, "weight": 1}, {"sft": {}, "weight": 0.5}]
    config = tmp_path / "run.yaml"
    config.write_text(
        f"policy: {files['policy']}\noutput_dir: {tmp_path / 'a'}\ndata:\n  train: {files['data']}\n"
        f"objective: {json.dumps(parts)}\nmax_steps: 1\npairs_per_step: 4\n"
    )
    main(["train", "--config", str(config)])
    state = json.loads((tmp_path / "a" / "checkpoints" / "step-000001" / "state.json").read_text())
    assert state["config"]["objective"] == "mixture"
    assert state["identity"]["loss"] == {"parts": parts}
    main(["train", "--config", str(config), "--objective", "[{dpo: {}}, {cpo: {}}]", "--dry_run"])
    assert "objective   mixture: 1 · dpo (beta 0.1, label_smoothing 0.0) + 1 · cpo (" in capsys.readouterr().out
    config.write_text(config.read_text() + "loss: {beta: 0.1}\n")
    assert "write each objective's settings into its part" in error_of(capsys, "train", "--config", str(config))


def test_yaml_cannot_run_code(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("policy: !!python/object/apply:os.system ['touch pwned']\noutput_dir: o\n")
    error_of(capsys, "train", "--config", str(config))
    assert not (tmp_path / "pwned").exists()


def test_a_missing_option_is_named(capsys):
    error = error_of(capsys, "train", "--output_dir", "o")
    assert error.startswith("tvkd train: error: required, and not given: --policy\n")
    assert "--policy, or --model\n" in error_of(capsys, "eval", "--data.eval", "o")


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    assert "Did you mean train?" in error_of(capsys, "trian")
    assert "There are score, train, sample, eval, explain, demo, scores, replay, plot, bench" in error_of(
        capsys, "help"
    )
    assert "usage: tvkd" in error_of(capsys)


def test_scores_without_a_teacher_say_so(files, tmp_path, capsys):
    options = ["--policy", files["policy"], "--data.train", files["data"]]
    main(["score", *options, "--output_dir", str(tmp_path / "scores")])
    printed = capsys.readouterr().out
    assert "this is the reference alone, for --objective d_dpo, dpo, " in printed
    assert "tvkd" not in printed.partition("--objective")[2]


def test_an_unknown_recipe_lists_the_known(capsys):
    assert f"no recipe or file 'dmeo'; recipes: {', '.join(recipes())}" in error_of(capsys, "train", "--config", "dmeo")


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--loss.beta", "0", "beta must be a positive number"),
        ("--loss.gamma", "1.5", r"gamma must be in [0, 1]"),
        ("--loss.kappa", "0", "kappa must be a positive number"),
        ("--data.train", "nowhere.jsonl", "nowhere.jsonl"),
        ("--optim.lr", "-1", "lr must be a positive number"),
    ],
)
def test_errors_of_a_run_are_one_line(option, value, wanted, files, tmp_path, capsys):
    arguments = ["train", "--policy", files["policy"], "--teacher", files["teacher"], "--data.train", files["data"]]
    error = error_of(capsys, *arguments, "--output_dir", str(tmp_path / "o"), "--max_steps", "1", option, value)
    assert wanted in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", COMMANDS)
def test_help_can_be_read(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: tvkd {command}")
    assert "[options]" in text.splitlines()[0]
    assert "default: null" in text or command == "demo"


def test_every_option_is_described(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("strength of the KL term", "Which state ends the shaping sum", "Peak learning rate", "Global batch"):
        assert words in text


@pytest.mark.parametrize("recipe", recipes())
def test_recipes_parse_and_resolve(recipe):
    config = load_recipe(recipe)
    assert isinstance(config.loss, objective_named(config.objective))
    assert config.policy
    assert config.max_steps


def test_the_papers_pair_is_planned_without_a_download(capsys):
    main(["train", "--config", "llama3.2-1b-dpomix", "--dry_run"])
    plan = capsys.readouterr().out
    assert "meta-llama/Llama-3.2-1B-Instruct: 1,235.8 M parameters, 16 layers" in plan
    assert "meta-llama/Llama-3.1-8B-Instruct: 8,030.3 M parameters, 32 layers" in plan
    assert "105: 64 pairs each" in plan
    for part in (
        "policy weights",
        "gradients",
        "AdamW's two moments",
        "activations",
        "reference weights",
        "teacher weights",
    ):
        assert part in plan
    assert "GiB" in plan


def test_a_plan_does_not_take_a_typing_error_for_the_hub(files, capsys):
    arguments = ["--policy", files["policy"], "--teacher", files["teacher"], "--data.train", "nowhere.jsonl"]
    assert "nowhere.jsonl does not exist" in error_of(capsys, "train", *arguments, "--output_dir", "o", "--dry_run")


def test_a_plan_counts_local_data_and_writes_nothing(files, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--policy", files["policy"], "--teacher", files["teacher"], "--data.train", files["data"]]
    main(["train", *arguments, "--output_dir", str(out), "--dry_run", "--pairs_per_step", "4"])
    plan = capsys.readouterr().out
    assert "12 pairs of" in plan
    assert "steps       3: 4 pairs each" in plan
    assert not out.exists()


def test_a_benchmark_that_is_not_there_is_named(capsys):
    assert "name one of head, values, step, divergence, rollout; tvkd bench head --help" in error_of(capsys, "bench")
    assert "name one of head" in error_of(capsys, "bench", "nothing")


def test_a_wheel_has_no_benchmarks(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tvkd_fast.cli.positional.__file__", str(tmp_path / "tvkd_fast" / "cli" / "positional.py"))
    assert "the benchmarks are no part of a wheel: run it from a checkout" in error_of(capsys, "bench", "head")


def test_a_benchmark_gets_its_arguments(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tvkd"])
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "head", "--help"])
    assert stopped.value.code == 0
    assert "tokens x hidden x vocabulary" in capsys.readouterr().out


def test_scores_that_are_not_there_or_damaged_are_one_line(tmp_path, capsys):
    assert f"no score cache at {tmp_path}" in error_of(capsys, "scores", str(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    assert "manifest.json is of format None" in error_of(capsys, "scores", str(tmp_path))
    assert "usage: tvkd scores FOLDER" in error_of(capsys, "scores")
