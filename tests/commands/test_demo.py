import json

import pytest

from tvkd_fast.commands.demo import DemoConfig, run_demo, table
from tvkd_fast.commands.plot import plot_curves
from tvkd_fast.data.data_config import DataConfig
from tvkd_fast.training.optim import OptimConfig
from tvkd_fast.training.train_config import TrainConfig


@pytest.fixture
def recipe(model_folder):
    return TrainConfig(
        policy=model_folder(num_hidden_layers=4, max_position_embeddings=512),
        output_dir="unused",
        student_layers=2,
        data=DataConfig(train="bundled:train", eval="bundled:eval", train_limit=12, eval_limit=8),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        max_steps=3,
        pairs_per_step=4,
        eval_every=2,
    )


def test_the_demo_ends_with_a_table_a_picture_and_a_report(recipe, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: make venv, or pip install 'tvkd_fast[plot]'")
    lines: list[str] = []
    out = tmp_path / "demo"
    config = DemoConfig(out=str(out), teacher_steps=2, warm_steps=2, judged=4)
    report = run_demo(config, recipe, report_line=lines.append)
    assert report == json.loads((out / "report.json").read_text())
    for name in ("start", "dpo", "tvkd", "teacher"):
        assert {"accuracy", "margin", "accuracy_ci", "margin_ci", "judged"} <= report[name].keys()
    assert report["pairs"] == 8
    assert len(report["answers"]) == 3
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert table(report) in "\n".join(lines)
    assert report["made_by"]["torch"]
    steps = {name: (out / name / "metrics.jsonl").read_text().count('"loss"') for name in ("dpo", "tvkd")}
    assert steps["dpo"] >= 3
    assert steps["tvkd"] >= 3

    lines.clear()
    again = run_demo(config, recipe, report_line=lines.append)
    assert lines[:6] == [f"{name}: done already" for name in ("base", "teacher", "student", "scores", "dpo", "tvkd")]
    assert {k: again[k] for k in ("start", "dpo", "tvkd", "teacher")} == {
        k: report[k] for k in ("start", "dpo", "tvkd", "teacher")
    }

    with pytest.raises(ValueError, match="holds a demo with other settings: give --out a folder of its own"):
        run_demo(DemoConfig(out=str(out), teacher_steps=3, warm_steps=2, judged=4), recipe)


def test_the_demo_needs_a_depth_to_prune_to(recipe, tmp_path):
    recipe.student_layers = None
    with pytest.raises(ValueError, match="set student_layers in the recipe"):
        run_demo(DemoConfig(out=str(tmp_path), teacher_steps=1, warm_steps=1), recipe, report_line=lambda text: None)


def test_drawing_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'tvkd_fast\[plot\]'"):
        plot_curves({}, tmp_path / "curves.png", title="")
