"""The pages are correct: code runs, tables are what their JSON says, links lead somewhere."""

import re
import sys
from inspect import signature
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
"""The results, which a checkout has and an sdist does not."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        monkeypatch.delitem(sys.modules, name)
    from bench.tables import pages

    if not RESULTS.is_dir():
        pytest.skip("bench/results is no part of an sdist")
    return pages


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        left_out = RESULTS in ((page.parent / target) / "_").resolve().parents and not RESULTS.exists()
        if not target.startswith("http") and not left_out:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_sites_links_lead_to_its_pages():
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs installs it")
    hooks = run_path(str(ROOT / "docs" / "hooks.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))

    def shown(text):
        return hooks["on_page_markdown"](text, page, None, None)

    assert shown("[a](docs/method.md#b) [`code`](docs/packing.md)") == "[a](method.md#b) [`code`](packing.md)"
    assert shown("![p](docs/pictures/explain.png)") == "![p](pictures/explain.png)"
    assert shown("[`setup.py`](setup.py) [it](setup.py)") == "`setup.py` it (`setup.py`)"
    code = "`[a](docs/method.md)`\n```\n[a](docs/method.md)\n```\n[a](https://x.org/`y`)"
    assert shown(code) == code


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The files of CONTRIBUTING.md's example, of which the objective is among the package's."""
    from tvkd_fast import objectives as package
    from tvkd_fast.objectives import registry

    page = (ROOT / "CONTRIBUTING.md").read_text()
    for name, text in re.findall(r'```\w+ title="(.*?)"\n(.*?)```', page, re.DOTALL):
        (tmp_path / Path(name).name).write_text(text)
    # All are imported first: an objective registers once, and must not do so in the copy alone.
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry.objectives()))
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("tvkd_fast.objectives.slic", None)
    vars(package).pop("slic", None)


def test_the_objective_of_contributing_is_one(example):
    from tvkd_fast.cli.parser import load_recipe
    from tvkd_fast.objectives import objective_named

    slic = objective_named("slic")
    folder = ROOT / "tests" / "objectives"
    made = run_path(str(folder / "conftest.py"))
    fixtures = {"found": slic(), "batch_of": made["make_batch"], "numbers_of": made["make_numbers"]}
    contract = run_path(str(folder / "test_contract.py"))
    held = [f for name, f in contract.items() if name.startswith("test_") and "found" in signature(f).parameters]
    assert held
    for promise in held:
        promise(**{name: fixtures[name] for name in signature(promise).parameters})
    run_path(str(example / "test_slic.py"))["test_the_loss_is_the_formula"]()
    config = load_recipe(str(example / "slic-smollm2-135m.yaml"))
    assert config.loss == slic()


def test_every_objective_and_recipe_has_its_row():
    from tvkd_fast.cli.parser import recipes
    from tvkd_fast.objectives import objectives

    for page, names in (("objectives.md", objectives()), ("recipes.md", recipes())):
        rows = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / page).read_text(), re.MULTILINE)
        assert set(names) <= set(rows), page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, model_folder, tiny_model, templateless, tmp_path, monkeypatch):
    text = page.read_text()
    if "integrations.trl" in text:
        pytest.importorskip("trl", reason="TRL is not installed: pip install 'tvkd_fast[trl]'")
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ids = torch.randint(1, 262, (2, 6))
    names = {
        "policy": model_folder(seed=0, tokenizer=templateless),
        "teacher": model_folder(seed=1, tokenizer=templateless),
        "dataset": Dataset.from_list([{"prompt": "say a.", "chosen": " a", "rejected": " b"}] * 4),
        "model": tiny_model(0),
        "batch": {"input_ids": ids, "labels": ids},
        "hidden": torch.randn(5, 8, requires_grad=True),
        "labels": torch.randint(30, (5,)),
        "lm_head": torch.nn.Linear(8, 30, bias=False),
    }
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, page.name, "exec"), names)


def test_the_readmes_two_lines_agree():
    text = (ROOT / "README.md").read_text()
    before, after = re.search(r"```python\n(# before.*?)\n\n(# after.*?)```", text, re.DOTALL).groups()
    names = {
        "hidden": torch.randn(5, 8),
        "labels": torch.randint(30, (5,)),
        "lm_head": torch.nn.Linear(8, 30, bias=False),
    }
    exec(before, names)
    eager = names["logps"]
    exec(after, names)
    torch.testing.assert_close(names["logps"], eager)


def test_every_table_is_what_its_json_says(results):
    assert results.stale() == []


def test_a_tables_source_is_a_short_line_with_a_link_to_its_json(results):
    for page in results.PAGES:
        for block in results.BLOCK.finditer(page.read_text()):
            lines = [line for line in block[0].splitlines() if f"bench/results/{block[3]}.json)" in line]
            assert len(lines) <= 1
            assert all(len(line) <= 130 for line in lines), lines
            is_pending = block[2] in results.PENDING and not (RESULTS / f"{block[3]}.json").exists()
            without = is_pending or block[2] in {"shaping", "rejected", "model"}
            assert lines or without, f"{page.name}: {block[2]} {block[3]}"


def test_a_table_that_is_not_would_be_found(results, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    text = (ROOT / "docs" / "results.md").read_text()
    page.write_text(re.sub(r"\| TVKD \| 0\.\d+", "| TVKD | 0.999", text))
    monkeypatch.setattr(results, "PAGES", (page,))
    assert page.read_text() != text
    assert results.stale() == ["page.md"]


def test_paths_of_a_machine_do_not_get_in(results):
    from bench.harness.machine import without_paths

    assert (
        without_paths("tvkd demo --train /home/me/data/x.jsonl.gz --out out/hh")
        == "tvkd demo --train x.jsonl.gz --out out/hh"
    )
    for file in RESULTS.glob("*.json"):
        assert without_paths(file.read_text()) == file.read_text()


def test_the_readmes_commands_exist():
    from tvkd_fast.cli.parser import COMMANDS
    from tvkd_fast.cli.positional import BENCHMARKS

    commands = re.findall(r"^tvkd (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(commands) == {*COMMANDS, "scores", "bench", "plot", "export"}
    assert re.findall(r"^tvkd bench (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE) == list(BENCHMARKS)
