"""The numbers of `tvkd explain` are those of the loss."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tvkd_fast.cli.main import main
from tvkd_fast.commands.explain import ExplainConfig, heats_of
from tvkd_fast.data import MicroBatching, build_dataset
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.losses import shaping_returns
from tvkd_fast.models import TeacherWithHead, load_model, load_tokenizer
from tvkd_fast.objectives.tvkd import TVKD
from tvkd_fast.ops import soft_values


@pytest.mark.parametrize(
    "loss",
    [
        TVKD(),
        TVKD(gamma=0.9, terminal="eos", value_from="logprobs", kappa=0.7),
        TVKD(gamma=0.5),
        TVKD(terminal="zero"),
    ],
)
def test_the_steps_sum_to_the_return(files, model_folder, loss):
    folder = model_folder(seed=1)
    tokenizer = load_tokenizer(folder)
    dataset = build_dataset(files / "eval.jsonl", tokenizer)
    config = ExplainConfig(teacher=folder, output_dir="", pair=3, loss=loss)
    heats = heats_of(dataset, config, tokenizer)
    teacher = TeacherWithHead(load_model(folder), kappa=loss.kappa)
    (batch,) = MicroBatching("padded").batches(dataset, [3])
    with torch.no_grad():
        lse, lse_kappa = teacher(batch)
    values = soft_values(lse, lse_kappa, kappa=loss.kappa, value_scale=loss.beta, value_from=loss.value_from)
    psi = shaping_returns(values, batch.cu_states, gamma=loss.gamma, terminal=loss.terminal, ended=batch.ended)
    assert [heat.total for heat in heats] == pytest.approx(psi.tolist(), abs=1e-5)
    for heat, text in zip(heats, (dataset.texts[3].chosen, dataset.texts[3].rejected), strict=True):
        assert len(heat.values) == len(heat.steps) + 1 == len(heat.tokens) + 1
        assert "".join(heat.tokens).startswith(text)
        # The change that is shown for a token fits its step, but where the step to the end is left out.
        want = [loss.gamma * after - before for before, after in pairwise(heat.values)]
        kept = slice(-1) if loss.terminal == "last_content" else slice(None)
        assert heat.steps[kept] == pytest.approx(want[kept], abs=1e-5)


def test_letters_of_several_tokens_are_whole(files, model_folder, write_jsonl):
    folder = model_folder(seed=1)
    tokenizer = load_tokenizer(folder)
    dataset = build_dataset(write_jsonl([{"prompt": "say é.", "chosen": "é€!", "rejected": "no"}]), tokenizer)
    chosen, _ = heats_of(dataset, ExplainConfig(teacher=folder, output_dir=""), tokenizer)
    assert "".join(chosen.tokens).startswith("é€!")
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(chosen.tokens)


def command(files, model_folder, tmp_path, pair):
    options = {"teacher": model_folder(seed=1), "data.eval": files / "eval.jsonl", "pair": pair}
    return ["explain", *(f"--{name}={value}" for name, value in options.items()), f"--output_dir={tmp_path / 'shown'}"]


def test_the_command_writes_a_page_and_a_picture(files, model_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'tvkd_fast[plot]'")
    main(command(files, model_folder, tmp_path, 2))
    html, picture = capsys.readouterr().out.split()
    text = Path(html).read_text()
    assert text.count("<h2>") == 2
    assert "title=" in text
    assert Path(picture).read_bytes()[:4] == b"\x89PNG"


def test_a_pair_that_is_not_there_is_refused(files, model_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(command(files, model_folder, tmp_path, 99))
    assert "set --pair to at most 9" in capsys.readouterr().err


def test_the_rewards_of_a_teacher_start_at_nothing(files, model_folder):
    folder = model_folder(seed=1)
    tokenizer = load_tokenizer(folder)
    dataset = build_dataset(files / "eval.jsonl", tokenizer)
    loss = TVKD(value_from="implicit_reward")
    config = ExplainConfig(
        teacher=folder, teacher_reference=model_folder(seed=0), output_dir="", loss=loss, data=DataConfig()
    )
    for heat in heats_of(dataset, config, tokenizer):
        assert heat.values[0] == 0.0
        assert heat.values[1] != 0.0
