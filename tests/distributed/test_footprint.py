"""The planner's count of the bytes that a step sends, against two and four processes over gloo."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHANGES = {"objective": "dpo", "teacher": None, "eval_every": 0}
WHOLE, EVERY = {"vocabulary": "gathered"}, {"vocabulary": "gathered", "reduce": "micro_batch"}
GATHERED = {
    "one": {"family": "tied", "tokens_per_micro_batch": 2048, "parallel": WHOLE},
    "untied": {"family": "untied", "tokens_per_micro_batch": 2048, "parallel": WHOLE},
    "several": {"family": "tied", "tokens_per_micro_batch": 90, "parallel": WHOLE, "pairs_per_step": 12},
    "every": {"family": "tied", "tokens_per_micro_batch": 90, "parallel": EVERY, "pairs_per_step": 12},
}
SHARED = {
    "tied": {"family": "tied", "tokens_per_micro_batch": 2048},
    "untied": {"family": "untied", "tokens_per_micro_batch": 2048},
    "several": {"family": "tied", "tokens_per_micro_batch": 54},
}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.distributed)])
def test_a_step_sends_what_is_counted(
    processes: int, tmp_path: Path, launch: Callable[..., str], write_recipe: Callable[..., Path]
) -> None:
    """Processes start once for both layouts of the vocabulary."""
    uneven = CHANGES | {"data": {"train": str(tmp_path / "pairs.jsonl")}}
    shared = even(tmp_path) | {"parallel": {"vocabulary": "shared"}}
    recipes = [write_recipe(tmp_path, f"gathered-{name}", **case, **uneven) for name, case in GATHERED.items()]
    recipes += [write_recipe(tmp_path, f"shared-{name}", **case, **shared) for name, case in SHARED.items()]
    found = list(sent(launch, processes, recipes))
    gathers_weights(dict(zip(GATHERED, found[: len(GATHERED)], strict=True)))
    sends_states(dict(zip(SHARED, found[len(GATHERED) :], strict=True)))


def gathers_weights(found: dict[str, dict]) -> None:
    for one in found.values():
        assert one["sent"]["reduced"] == pytest.approx(one["counted"]["gradients, reduced"], rel=0.01)
        assert one["sent"]["gathered"] == pytest.approx(one["counted"]["weights, gathered"], rel=0.01)
    assert found["several"]["micro_batches"] > 1
    assert found["every"]["sent"]["reduced"] > 1.9 * found["several"]["sent"]["reduced"]


def sends_states(found: dict[str, dict]) -> None:
    for one in found.values():
        assert one["sent"]["states"] == pytest.approx(states(one), rel=0.01)
        assert one["sent"]["reduced"] == pytest.approx(one["counted"]["gradients, reduced"], rel=0.01)
        assert one["sent"]["gathered"] == pytest.approx(one["counted"]["weights, gathered"], rel=0.01)
    assert found["several"]["micro_batches"] > 1
    # However many micro-batches there are, each token travels once.
    assert found["several"]["sent"]["states"] == found["tied"]["sent"]["states"]


@pytest.mark.distributed
def test_replicas_send_gradients(tmp_path: Path, launch: Callable[..., str], write_recipe: Callable[..., Path]) -> None:
    two = {"replicas": 2, "vocabulary": "gathered"}
    cases = {
        "gathered": {"family": "tied", "tokens_per_micro_batch": 2048, "parallel": two},
        "every": {"family": "tied", "tokens_per_micro_batch": 54, "parallel": two | {"reduce": "micro_batch"}},
        "tied": {"family": "tied", "tokens_per_micro_batch": 54, "parallel": two | {"vocabulary": "shared"}},
        "untied": {"family": "untied", "tokens_per_micro_batch": 2048, "parallel": two | {"vocabulary": "shared"}},
        "lora": {
            "family": "tied",
            "tokens_per_micro_batch": 2048,
            "parallel": two | {"vocabulary": "shared"},
            "lora": {"rank": 4},
        },
    }
    recipes = [write_recipe(tmp_path, name, **case, **even(tmp_path)) for name, case in cases.items()]
    found = dict(zip(cases, sent(launch, 4, recipes), strict=True))
    for one in found.values():
        assert one["sent"]["replicas"] == pytest.approx(one["counted"]["gradients, replicas"], rel=0.01)
    for name in ("tied", "untied", "lora"):
        assert found[name]["sent"]["states"] == pytest.approx(states(found[name]), rel=0.01)
    assert found["tied"]["micro_batches"] > 1


@pytest.mark.distributed
@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
def test_a_shared_head_holds_what_is_counted(autocast: str, launch: Callable[..., str]) -> None:
    held, counted = map(float, launch(2, "held_head.py", autocast).splitlines()[-1].split())
    # Its tiles are small beside so many states, and not counted among them.
    assert 0.9 * counted < held < 1.1 * counted


def even(folder: Path) -> dict:
    """A run over pairs of one length: what is counted is means, and rows of a micro-batch are filled to its longest."""
    rows = [{"prompt": f"{i:02}: say it.", "chosen": f"red {i:02}", "rejected": f"no {i:02} no"} for i in range(24)]
    pairs = folder / "even.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CHANGES | {"data": {"train": str(pairs)}, "pairs_per_step": 12}


def states(one: dict) -> float:
    """Return the counted bytes of a shared vocabulary, the head's and the embedding's."""
    return one["counted"]["states of tokens"] + one["counted"].get("embeddings of tokens", 0.0)


def sent(launch: Callable[..., str], processes: int, recipes: list[Path]) -> Iterator[dict]:
    """Yield the bytes that each recipe's second step sent, and their count."""
    lines = launch(processes, "sent_step.py", *map(str, recipes)).splitlines()
    return (json.loads(line) for line in lines if line.startswith("{"))
