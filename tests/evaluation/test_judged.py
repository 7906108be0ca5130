"""Models beside each other: scores by hand, RewardBench's sections and ties, pages, and the command."""

import json
import math
import re

import pytest
import torch

from tvkd_fast.cli.main import main
from tvkd_fast.commands.models import load_policy
from tvkd_fast.data import MicroBatching, build_dataset, collate_pairs
from tvkd_fast.evaluation.evaluate import evaluate, measure
from tvkd_fast.evaluation.html import html_page, markdown_page
from tvkd_fast.evaluation.judged import Judged, by_row, compared, judge_pairs, table
from tvkd_fast.models import load_tokenizer
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.scoring.scorer import OnlineScorer

SUBSETS = ["llmbar-natural", "mt-bench-hard", "hep-go"]


@pytest.fixture
def pairs(files, model_folder):
    folder = model_folder(seed=0)
    return build_dataset(files / "eval.jsonl", load_tokenizer(folder)), load_policy(folder, ModelConfig())


@pytest.fixture
def bench(tmp_path):
    rows = [
        {"id": i, "subset": SUBSETS[i % 3], "prompt": f"{i}: say ab.", "chosen": "ab", "rejected": "no " * (1 + i % 4)}
        for i in range(12)
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_pair_that_is_scored_as_nan_is_no_wrong_one(pairs, monkeypatch):
    dataset, policy = pairs
    numbers = torch.tensor([[-1.0, -2.0, math.nan], [-2.0, -1.0, -2.0]], dtype=torch.float64)
    for module in ("judged", "evaluate"):
        found = numbers if module == "judged" else torch.zeros(7, 3).double().index_fill(0, torch.tensor([0]), math.nan)
        monkeypatch.setattr(f"tvkd_fast.evaluation.{module}.measure", lambda *args, found=found, **kwargs: found)
    few = [dataset[i] for i in range(3)]
    with pytest.raises(ValueError, match=rf"m scores 1 of 3 pairs as NaN, the first of them {few[2].row}"):
        judge_pairs("m", policy, few)
    figures = evaluate(policy, few)
    assert math.isnan(figures.accuracy)
    assert "accuracy" not in figures.known()


@pytest.mark.parametrize("how", ["mean", "sum", "norm", "reference"])
def test_a_response_scores_what_its_tokens_do(pairs, model_folder, how):
    dataset, policy = pairs
    reference = load_policy(model_folder(seed=1), ModelConfig())
    scorer = OnlineScorer(reference, None) if how == "reference" else None
    kind = "mean" if how == "reference" else how
    judged = judge_pairs(
        "it", policy, dataset, reference=scorer, reference_free=kind, batching=MicroBatching(tokens=90)
    )
    for i, pair in enumerate(dataset):
        batch = collate_pairs([pair], [i])
        with torch.no_grad():
            tokens = [x.double() for x in policy(batch).split(batch.cu_seqlens.diff().tolist())]
            known = [x.double() for x in reference(batch).split(batch.cu_seqlens.diff().tolist())]
        want = {
            "mean": lambda x, r: x.mean(),
            "sum": lambda x, r: x.sum(),
            "norm": lambda x, r: -x.norm(),
            "reference": lambda x, r: x.sum() - r.sum(),
        }[how]
        expected = [float(want(x, r)) for x, r in zip(tokens, known, strict=True)]
        assert [float(judged.chosen[i]), float(judged.rejected[i])] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_numbers_come_in_the_datasets_order_however_it_is_packed(pairs):
    dataset, policy = pairs
    for tokens in (60, 2048):
        places = measure(
            policy, dataset, lambda batch: batch.pairs[None].double(), batching=MicroBatching(tokens=tokens)
        )
        assert places[0].tolist() == list(range(len(dataset)))


def judged(name, chosen, rejected):
    return Judged(name, torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64))


def test_a_row_is_right_where_all_of_its_pairs_are():
    model = by_row(judged("a", [2.0, 3.0, 1.0, 5.0, 4.0], [1.0, 0.0, 1.5, 4.0, 4.0]), ["x", "x", "y", "z", "z"])
    assert (model.chosen.tolist(), model.rejected.tolist()) == ([2.0, 1.0, 4.0], [1.0, 1.5, 4.0])
    assert model.right.tolist() == [1.0, 0.0, 0.0]


def test_a_tie_is_wrong():
    model = judged("a", [1.0, 2.0, 2.0], [0.0, 2.0, 3.0])
    assert model.right.tolist() == [1.0, 0.0, 0.0]
    assert compared([model], ["x"] * 3, sections=False)["models"][0]["ties"] == 1


def test_sections_weigh_subsets_as_the_benchmark_does():
    subsets = ["llmbar-natural"] * 2 + ["mt-bench-hard"] * 4
    model = judged("a", [1, 1, 1, 0, 0, 0], [0.0] * 6)
    (row,) = compared([model], subsets, sections=True)["models"]
    assert row["subsets"]["llmbar-natural"]["mean"] == 1.0
    assert row["subsets"]["mt-bench-hard"]["mean"] == 0.25
    assert row["sections"]["Chat Hard"]["mean"] == pytest.approx((100 * 1.0 + 37 * 0.25) / 137)
    assert row["sections"]["Chat Hard"]["subsets"] == 2
    # Three sections have no pair here: there is no score of the benchmark.
    assert "score" not in row


def test_the_score_is_the_mean_of_the_sections():
    subsets = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", "hep-go"]
    (row,) = compared([judged("a", [1, 1, 1, 0], [0.0] * 4)], subsets, sections=True)["models"]
    assert row["score"]["mean"] == 0.75
    assert row["score"]["interval"] == [0.75, 0.75]


def test_models_are_compared_pair_by_pair():
    zeros = [0.0] * 40
    first, better = judged("a", [-1, 1] * 20, zeros), judged("b", [1] * 40, zeros)
    found = compared([first, better, first], ["x"] * 40, sections=False)
    ahead = found["models"][1]["ahead"]
    assert ahead["mean"] == 0.5
    assert ahead["interval"][0] > 0.3
    assert ahead["p"] < 0.01
    assert found["models"][2]["ahead"] == {"mean": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    lines = table(found).splitlines()
    assert lines[0] == "| | pairs | a | b | a |"
    assert {line.count("|") for line in lines} == {6}
    assert "ahead of a" in lines[-1]


def test_a_difference_and_its_p_weigh_pairs_alike():
    """Test many pairs of a light subset against few of a heavy one: the few decide, and disagree with the many."""
    subsets = ["mt-bench-hard"] * 60 + ["llmbar-adver-neighbor"] * 12
    zeros = [0.0] * 72
    first = judged("a", [-1] * 60 + [1] * 12, zeros)
    second = judged("b", [1] * 6 + [-1] * 54 + [-1] * 12, zeros)
    ahead = compared([first, second], subsets, sections=True)["models"][1]["ahead"]
    assert ahead["mean"] == pytest.approx((37 * 0.1 - 134) / 171)
    assert ahead["p"] < 0.01


def test_subsets_that_are_not_the_benchmarks_are_all_there_is():
    models = [judged("a", [1, 1, -1], [0.0] * 3), judged("b", [1, 1, 1], [0.0] * 3)]
    found = compared(models, ["mine", "mine", "yours"], sections=True)
    assert found["models"][1]["score"]["mean"] == 1.0
    assert found["models"][1]["ahead"]["mean"] == pytest.approx(1 / 3)
    assert "| **all** | 3 |" in table(found)


def command(first, second, data, *more):
    return ["eval", "--model", first, "--model", second, "--data", str(data), *more]


def test_the_command_prints_a_table_and_a_line(bench, model_folder, tmp_path, capsys):
    first, second = model_folder(seed=0), model_folder(seed=1)
    output = tmp_path / "found.jsonl"
    main(command(first, second, bench, "--format=rewardbench", f"--output={output}"))
    *shown, line = capsys.readouterr().out.strip().splitlines()
    found = json.loads(line)
    assert found == json.loads(output.read_text())
    assert [row["model"] for row in found["models"]] == [first, second]
    assert {row["pairs"] for row in found["models"][0]["subsets"].values()} == {4}
    assert any(row.startswith("| **Chat Hard**, 2 of 6 subsets") for row in shown)
    assert math.isfinite(found["models"][1]["ahead"]["p"])


def test_models_are_compared_on_pairs_of_any_format(files, model_folder, capsys):
    models = [model_folder(seed=seed) for seed in range(3)]
    main(command(*models[:2], files / "eval.jsonl", f"--reference={models[2]}"))
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["pairs"] == 10
    assert found["scores"] == "reference"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "rewardbench"], "without subset.*Leave out --format rewardbench"),
        (["--format", "rewardbench", "--reference", "{0}", "--teacher", "{0}"], "leave out --teacher"),
        (["--generate_prompts", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_tabled_is_refused(files, model_folder, capsys, arguments, message):
    folder = model_folder(seed=0)
    arguments = [argument.format(folder) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--model", folder, "--data", str(files / "eval.jsonl"), *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_answers_stand_side_by_side(bench, model_folder, tmp_path, capsys):
    first, second = model_folder(seed=0), model_folder(seed=1)
    pages = [f"--generate={tmp_path / 'pages'}", "--generate_prompts=3", "--max_new_tokens=4"]
    main(command(first, second, bench, "--format=rewardbench", *pages))
    capsys.readouterr()
    markdown = (tmp_path / "pages" / "answers.md").read_text()
    assert markdown.count("\n## ") == 3
    assert "> 0: say ab." in markdown
    assert "> 8: say ab." in markdown
    html = (tmp_path / "pages" / "answers.html").read_text()
    assert html.count("<section>") == 3
    assert html.count("<h2>") == 6


@pytest.mark.parametrize("table", [True, False])
def test_a_model_that_cannot_be_asked_is_named_before_it_is_evaluated(
    table, files, model_folder, templateless, tmp_path, capsys
):
    folder = model_folder(seed=0, tokenizer=templateless)
    several = command(folder, model_folder(seed=1), files / "eval.jsonl")
    arguments = several if table else ["eval", "--policy", folder, "--data.eval", str(files / "eval.jsonl")]
    with pytest.raises(SystemExit):
        main([*arguments, f"--generate={tmp_path}"])
    replies = capsys.readouterr()
    assert f"{folder} has no chat template" in replies.err
    assert not replies.out


def test_what_models_write_cannot_break_the_pages():
    prompts = [[{"role": "user", "content": "<b>\n# a"}]]
    replies = {"m": ["</p><script>x</script>\n# heading\r# another\u2028# third"]}
    html = html_page(prompts, replies)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    markdown = markdown_page(prompts, replies)
    assert [line for line in markdown.splitlines() if line.startswith("# ")] == ["# Answers side by side"]
    replies = {"m": ["```c\nx = a < b && c;\n````"]}
    assert "> `````\n> ```c\n> x = a < b && c;\n> ````\n> `````\n" in markdown_page(prompts, replies)


def test_a_policy_that_was_named_stays_the_first(files, model_folder, capsys):
    first, second = model_folder(seed=0), model_folder(seed=1)
    main(["eval", "--policy", first, "--model", second, "--data", str(files / "eval.jsonl")])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["model"] for row in found["models"]] == [first, second]


def test_prompts_with_several_answers_count_once(model_folder, tmp_path, capsys):
    """Test rows as in RewardBench 2: every answer scored by itself, and chosen ones against the best of the others."""
    rows = [
        {"id": "1", "subset": "Math", "prompt": "1: say ab.", "chosen": ["ab"], "rejected": ["no", "ba", "b"]},
        {"id": "2", "subset": "Math", "prompt": "2: say ab.", "chosen": ["b"], "rejected": ["ab", "no no", "aa"]},
        {"id": "ref:1", "subset": "Ties", "prompt": "3: say a.", "chosen": ["ab", "a", "aa"], "rejected": ["no", "bb"]},
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = model_folder(seed=0)
    main(["eval", "--model", str(folder), "--data", str(tmp_path / "bench.jsonl"), "--format", "rewardbench"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    singles = [
        {"prompt": row["prompt"], "chosen": a, "rejected": b, "subset": f"{i} {j}"}
        for i, row in enumerate(rows)
        for j, (a, b) in enumerate((a, b) for a in row["chosen"] for b in row["rejected"])
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in singles))
    main(["eval", "--model", str(folder), "--data", str(tmp_path / "bench.jsonl"), "--format", "rewardbench"])
    of_pairs = json.loads(capsys.readouterr().out.splitlines()[-1])["models"][0]["subsets"]
    right = [min(x["mean"] for name, x in of_pairs.items() if name.startswith(f"{i} ")) for i in range(3)]
    assert found["pairs"] == 3
    subsets = found["models"][0]["subsets"]
    assert {name: (x["pairs"], x["mean"]) for name, x in subsets.items()} == {
        "Math": (2, sum(right[:2]) / 2),
        "Ties": (1, right[2]),
    }


def test_pages_of_models_that_answered_other_prompts_are_refused():
    for page in (html_page, markdown_page):
        with pytest.raises(ValueError, match="shorter"):
            page(["Why?", "How?"], {"a": ["x", "y"], "b": ["x"]})
        assert "Why?" in page(["Why?"], {"a": ["x"]})
