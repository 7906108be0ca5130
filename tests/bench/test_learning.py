"""The study of the teacher's value: what is compared with what, and the arms that are made up."""

import json
from argparse import Namespace
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch

from tvkd_fast.commands.models import load_policy
from tvkd_fast.data import MicroBatching, build_dataset
from tvkd_fast.losses import shaping_returns
from tvkd_fast.models import load_tokenizer
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.scoring.layout import Scores

needs_scipy = pytest.mark.skipif(
    find_spec("scipy") is None, reason="scipy is not installed: pip install 'tvkd_fast[bench]'"
)


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))


@pytest.fixture
def pairs(model_folder, write_jsonl):
    words = ["red", "green", "blue", "sun"]
    rows = [
        {"prompt": f"{i}: say.", "chosen": words[i % 4] * (1 + i % 3), "rejected": "no " * (1 + i % 5)}
        for i in range(20)
    ]
    folder = model_folder(seed=0)
    return build_dataset(write_jsonl(rows), load_tokenizer(folder)), load_policy(folder, ModelConfig())


class Teacher:
    """Return a number per state that rises along a response, and fluctuates."""

    def of(self, batch):
        torch.manual_seed(int(batch.pairs.sum()))
        lse = torch.cat([torch.arange(int(n)).float() for n in batch.cu_states.diff()]) + 0.1 * torch.randn(
            len(batch.states)
        )
        return Scores(lse=lse, lse_kappa=2 * lse)


class Reference:
    def of(self, batch):
        return Scores(torch.arange(2.0 * batch.num_pairs))


def record(arm, seed, margins):
    columns = dict.fromkeys(("margin", "chosen_gain", "reward_margin", "length"), margins)
    curve = [{"step": 1, "margin": 0.0, "loss": 0.7}, {"step": 2, "margin": margins[0], "loss": 0.6}]
    one = {"cell": "human, 6 layers", "arm": arm, "seed": seed, "curve": curve, "cpu_seconds": 9.0, "commit": "abc"}
    return one | {"pairs": columns}


RUNS = [
    record("DPO", 1, [1.0, -1.0, 2.0]),
    record("DPO", 2, [0.0, -3.0, 2.0]),
    record("a", 2, [1.0, -2.0, 3.0]),
    record("a", 1, [2.0, 0.5, 3.5]),
    record("a", 7, [99.0, 99.0, 99.0]),
]


@needs_scipy
def test_an_arm_stands_beside_dpo_of_its_own_seed():
    from scipy import stats

    from bench.learning.report import ahead

    dpo, other = ahead(RUNS, "human, 6 layers")
    assert (dpo["further"], dpo["further_p"]) == (0.0, 1.0)
    # Seed 7 has no DPO beside it.
    assert other["seeds"] == 2
    assert other["further_by_seed"] == pytest.approx([4.0 / 3, 1.0])
    assert other["further"] == pytest.approx(7.0 / 6)
    assert other["better"] == pytest.approx(2.0 / 6)
    # Means of seeds are 4/3 and 1, of pairs 1, 5/4 and 5/4: s² 1/18 and 1/48, over two and over three.
    seeds, pairs = 1 / 36, 1 / 144
    reach = stats.t.ppf(0.975, (seeds + pairs) ** 2 / (seeds**2 / 1 + pairs**2 / 2)) * (seeds + pairs) ** 0.5
    assert other["further_interval"] == pytest.approx((7 / 6 - reach, 7 / 6 + reach))
    assert ahead(RUNS, "rule, 3 layers") == []


@needs_scipy
def test_an_interval_covers_the_mean_over_other_seeds_and_pairs():
    from bench.learning.report import crossed

    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    covered = small = 0
    for _ in range(400):
        differences = 0.3 + 0.5 * normal(5, 1) + 2.0 * normal(1, 60) + 1.0 * normal(5, 60)
        (low, high), _ = crossed(differences)
        covered += low <= 0.3 <= high
        small += crossed(differences - 0.3)[1] < 0.05
    # Of 400 draws at 95%, three standard errors are 13; the interval is wide where it errs.
    assert 367 <= covered <= 398
    assert small == 400 - covered


@needs_scipy
def test_no_difference_is_no_evidence():
    from bench.learning.report import crossed

    assert crossed(torch.zeros(5, 9, dtype=torch.float64)) == ((0.0, 0.0), 1.0)


def test_finalists_are_right_most_often_then_widest_one_of_a_family():
    from bench.learning.arms import finalists

    def row(arm, accuracy, margin):
        return {"arm": arm, "accuracy": accuracy, "margin": margin}

    rows = [row("DPO", 0.9, 99.0), row("TVKD, the paper's", 0.9, 99.0), row("γ = 0.95", 0.5, 40.0)]
    rows += [row("terminal eos", 0.6, 30.0), row("terminal zero, γ = 0.95", 0.6, 31.0)]
    rows += [row("logprobs, κ = 0.7", 0.7, 30.0), row("implicit reward", 0.6, 45.0)]
    assert finalists(rows) == ["logprobs, κ = 0.7", "terminal zero, γ = 0.95"]


def test_a_length_alone_is_as_wide_as_the_teachers_offset(pairs):
    from bench.learning.arms import ARMS, PAPER, ArmScorer, length_slope

    dataset, policy = pairs
    batches = list(MicroBatching(tokens=200).batches(dataset, range(len(dataset))))
    slope = length_slope(dataset, Teacher(), batches)
    scorer = ArmScorer(ARMS["length alone"], Reference(), None, slope, policy)
    offsets: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    lengths = []
    for batch in batches:
        for found, source in ((offsets, scorer), (wanted, Teacher())):
            scores = source.of(batch)
            values = PAPER.values(Scores(lse=scores.lse, lse_kappa=scores.lse))
            chosen, rejected = shaping_returns(values, batch.cu_states, ended=batch.ended).chunk(2)
            found.append(chosen - rejected)
        chosen, rejected = batch.cu_seqlens.diff().chunk(2)
        lengths.append((chosen - rejected).float())
    offset, longer = torch.cat(offsets), torch.cat(lengths)
    assert float(offset.std()) == pytest.approx(float(torch.cat(wanted).std()), rel=1e-4)
    assert float(torch.corrcoef(torch.stack([offset, longer]))[0, 1]) == pytest.approx(1.0, abs=1e-5)


def test_an_arm_is_given_its_own_potential(pairs):
    from bench.learning.arms import ARMS, ArmScorer

    dataset, policy = pairs
    (batch,) = MicroBatching(tokens=200).batches(dataset, range(3))

    def of(name):
        return ArmScorer(ARMS[name], Reference(), Teacher(), 0.0, policy).of(batch)

    assert of("DPO").lse is None
    assert torch.equal(of("α = 3").lse_kappa, Teacher().of(batch).lse)
    assert torch.equal(of("logprobs, κ = 0.7").lse_kappa, Teacher().of(batch).lse_kappa)
    own = of("the student's Rényi entropy, κ = 0.7")
    assert not own.ref_logps.any()
    assert own.lse.shape == batch.states.shape
    assert not own.lse.requires_grad


def test_kl_is_nothing_between_a_model_and_itself(pairs, model_folder):
    from bench.learning.arms import kl_loss

    dataset, policy = pairs
    (batch,) = MicroBatching(tokens=200).batches(dataset, range(3), chosen_only=True)
    assert float(kl_loss(policy, policy, batch).detach()) == pytest.approx(0.0, abs=1e-6)
    other = load_policy(model_folder(seed=1), ModelConfig())
    loss = kl_loss(policy, other, batch)
    loss.backward()
    assert float(loss.detach()) > 0
    assert all(parameter.grad is None for parameter in other.parameters())


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose runs are made up: each is asked for once, and those of an arm in `fails` end badly."""
    pytest.importorskip("scipy", reason="scipy is not installed: pip install 'tvkd_fast[bench]'")
    from bench.learning import __main__ as command

    asked: list[tuple[str, str, int]] = []
    fails: set[str] = set()

    def run(cell, arm, seed):
        asked.append((cell.name, arm, seed))
        if arm in fails:
            raise RuntimeError(arm)
        return record(arm, seed, [float(seed), -1.0, 2.0]) | {"cell": cell.name}

    class Pool:
        def submit(self, function, *arguments):
            job: Future[Any] = Future()
            try:
                job.set_result(function(*arguments))
            except RuntimeError as error:
                # After those that are done already, whichever is asked for first.
                Timer(0.3, job.set_exception, [error]).start()
            return job

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command.Study, "prepare", lambda *_: None)
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}")

    def make(**changes):
        given = {"data": data, "eval": data, "json": tmp_path / "study.json", "out": tmp_path / "out", "quick": False}
        return command.Study(Namespace(**given | changes))

    return Namespace(make=make, pool=Pool(), asked=asked, fails=fails, data=data)


def test_a_study_goes_on_where_it_was(study):
    first = study.make()
    first.screen(study.pool)
    first.finals(study.pool)
    # Thirteen arms, then four from five seeds.
    assert len(study.asked) == 13 + 4 * 5 == len(first.runs)
    again = study.make()
    for stage in (again.screen, again.finals, again.rule, again.smaller):
        stage(study.pool)
    assert len(study.asked) == len(set(study.asked)) == 58
    assert {arm for cell, arm, _ in study.asked if cell == "human, 3 layers"} == {"DPO", "TVKD, the paper's"}


def test_what_was_done_stays_where_a_run_fails(study):
    study.fails.add("α = 3")
    with pytest.raises(RuntimeError):
        study.make().screen(study.pool)
    assert len(study.make().runs) == 12
    study.fails.clear()
    study.make().screen(study.pool)
    assert study.asked[13:] == [("screen, 6 layers", "α = 3", 0)]


def test_another_study_is_refused(study, tmp_path, monkeypatch):
    study.make().screen(study.pool)
    with pytest.raises(SystemExit, match="of another quick"):
        study.make(quick=True)
    study.data.write_text("{} ")
    with pytest.raises(SystemExit, match="of another sha256"):
        study.make()
    with pytest.raises(SystemExit, match="holds models of another study"):
        study.make(json=tmp_path / "other.json")
    study.data.write_text("{}")
    from bench.learning import run

    monkeypatch.setattr(run, "BATCHING", None)
    with pytest.raises(SystemExit, match="holds models of another study"):
        study.make()


@needs_scipy
def test_tables_and_picture_are_made_of_the_runs(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'tvkd_fast[plot]'")
    from bench.learning.picture import picture
    from bench.learning.report import ahead
    from bench.tables.learning import data_table, finals_table, screen_table

    rows = ahead(RUNS, "human, 6 layers")
    budget = {"steps": 75, "pairs": 4, "train": 600, "curve": 32}
    kept = {"pairs": 40, "truncated": 3, "dropped_overlong": 9, "dropped_bad": {"empty response": 1}, "max_length": 160}
    made = dict.fromkeys(("torch", "transformers", "python", "commit", "machine", "command"), "x")
    report = {
        "rows": {"screen, 6 layers": rows, "human, 6 layers": rows, "rule, 3 layers": []},
        "runs": RUNS,
        "teachers": [{"data": "human", "pairs": {"margin": [1.0, -1.0]}}],
        "budgets": {"screen": budget, "human": budget, "rule": budget},
        "data": {data: {"train": kept, "held_out": kept} for data in ("screen", "human")},
        "made_by": made,
    }
    assert "| a | +1.33 | +1.17 [" in screen_table(report)
    finals = finals_table(report)
    assert "the teacher, 2 pairs | +0.00" in finals
    assert "rule, 3 layers" not in finals
    assert "[abc](JSON)." in finals
    assert "| human, held out | 50 | 40 | 3 | 9 | 1 | 160 |" in data_table(report)
    file = tmp_path / "study.json"
    file.write_text(json.dumps(report))
    picture(file)
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_kept_report_is_no_study_to_go_on_with(study, tmp_path):
    from bench.tables.learning import study_kept

    first = study.make()
    first.screen(study.pool)
    file = tmp_path / "study.json"
    kept = study_kept(json.loads(file.read_text()))
    assert kept["rows"] == json.loads(file.read_text())["rows"]
    file.write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="give the file that the study wrote"):
        study.make()
