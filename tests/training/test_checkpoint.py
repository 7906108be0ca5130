import json
import math
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import nn

from tvkd_fast.distributed import World
from tvkd_fast.objectives import objectives
from tvkd_fast.training.checkpoint import (
    SHARD_OF_ONE,
    STATE,
    CheckpointError,
    Checkpoints,
    check_same_run,
    read_state,
)

ALONE = World(torch.device("cpu"))


def made(steps=2, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(steps):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder, step, model, optimizer, extra, *, keep, score=None):
    checkpoints = Checkpoints(folder, ALONE, keep=keep)
    checkpoints.save(step, model, optimizer, extra, score=score)
    checkpoints.wait()
    return folder / f"step-{step:06d}"


def newest(folder):
    return Checkpoints(folder, ALONE, keep=1).newest()


def load(path, model, optimizer):
    Checkpoints(path.parent, ALONE, keep=1).load(path, model, optimizer)


def one_more(model, optimizer):
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()] + [random.random()]


def test_what_comes_back_goes_on_bit_for_bit(tmp_path):
    model, optimizer = made()
    random.seed(5)
    path = save(tmp_path, 2, model, optimizer, {"note": [1, "a"]}, keep=2)
    expected = one_more(model, optimizer)
    fresh, fresh_optimizer = made(steps=1, seed=9)
    random.seed(99)
    load(path, fresh, fresh_optimizer)
    got = one_more(fresh, fresh_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(expected[:-1], got[:-1], strict=True))
    assert expected[-1] == got[-1]
    assert read_state(path)["note"] == [1, "a"]
    assert read_state(path)["step"] == 2


def test_training_may_go_on_while_it_is_saved(tmp_path):
    """Test that a save holds the weights of the moment when it began."""
    model, optimizer = made()
    before = [p.detach().clone() for p in model.parameters()]
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    checkpoints.save(2, model, optimizer, {})
    one_more(model, optimizer)
    checkpoints.wait()
    fresh, fresh_optimizer = made(seed=9)
    load(tmp_path / "step-000002", fresh, fresh_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.parameters(), strict=True))


def test_the_best_stays_beside_the_newest(tmp_path):
    model, optimizer = made()
    for step, score in ((1, 0.2), (2, 0.7), (3, None), (4, 0.7), (5, 0.1), (6, 0.3)):
        save(tmp_path, step, model, optimizer, {}, keep=1, score=score)
    # Of equal ones the newer.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000006"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_score_that_is_not_finite_is_never_the_best(place, tmp_path):
    model, optimizer = made()
    for bad in (math.nan, math.inf, -math.inf):
        scores = [0.2, 0.1]
        scores.insert(place, bad)
        for step, score in enumerate(scores, start=1):
            save(tmp_path, step, model, optimizer, {}, keep=3, score=score)
        best = Checkpoints(tmp_path, ALONE, keep=3).best()
        assert best.name == ("step-000002" if place == 0 else "step-000001")
        assert json.loads((tmp_path / f"step-{place + 1:06d}" / "state.json").read_text())["score"] is None


def test_the_best_of_a_folder_in_which_a_score_was_written_as_nan(tmp_path):
    model, optimizer = made()
    for step, score in enumerate((0.1, 0.2, 0.15), start=1):
        save(tmp_path, step, model, optimizer, {}, keep=3, score=score)
    state = tmp_path / "step-000003" / "state.json"
    state.write_text(state.read_text().replace("0.15", "NaN"))
    assert Checkpoints(tmp_path, ALONE, keep=3).best().name == "step-000002"


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = made()
    for step in (1, 2, 9, 10):
        save(tmp_path, step, model, optimizer, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000009", "step-000010"]
    assert newest(tmp_path).name == "step-000010"


def test_a_damaged_later_one_neither_counts_nor_goes(tmp_path):
    model, optimizer = made()
    damaged = save(tmp_path, 6, model, optimizer, {}, keep=1) / SHARD_OF_ONE
    damaged.write_bytes(b"")
    for step in (2, 4):
        save(tmp_path, step, model, optimizer, {}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000006"]
    with pytest.warns(UserWarning, match="step-000006 is not a whole checkpoint"):
        assert newest(tmp_path).name == "step-000004"


def test_no_folder_is_no_checkpoint(tmp_path):
    assert newest(tmp_path / "none") is None


@pytest.mark.parametrize("name", [SHARD_OF_ONE, STATE])
@pytest.mark.parametrize("damage", ["missing", "torn", "flipped"])
def test_a_half_written_checkpoint_is_passed_over(name, damage, tmp_path):
    model, optimizer = made()
    save(tmp_path, 1, model, optimizer, {}, keep=3)
    path = save(tmp_path, 2, model, optimizer, {}, keep=3) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif name != STATE:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.write_text(content.decode().replace('"sha256"', '"sha255"'))
    with pytest.warns(UserWarning, match="step-000002 is not a whole checkpoint .* looking at the one before it"):
        assert newest(tmp_path).name == "step-000001"


def test_a_save_that_was_killed_is_invisible_and_cleared_later(tmp_path):
    model, optimizer = made()
    path = save(tmp_path, 1, model, optimizer, {}, keep=3)
    shutil.copytree(path, tmp_path / ".step-000002.partial")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest(tmp_path) == path
    save(tmp_path, 3, model, optimizer, {}, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch):
    model, optimizer = made()
    save(tmp_path, 1, model, optimizer, {}, keep=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tvkd_fast.training.checkpoint.save_file", full)
    message = r"could not save step 2 .*No space left on device.*Free some space .*step-000001 is kept"
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 2, model, optimizer, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
from tvkd_fast.distributed import World
from tvkd_fast.training.checkpoint import CheckpointError, Checkpoints
model = nn.Linear(256, 256)
optimizer = torch.optim.AdamW(model.parameters())
folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder, World(torch.device("cpu")), keep=1)
checkpoints.save(1, model, optimizer, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoints.save(2, model, optimizer, {})
    checkpoints.wait()
except CheckpointError as error:
    print(error)
print(checkpoints.newest().name, len(list(folder.iterdir())))
"""


@pytest.mark.e2e
@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX's")
def test_a_disk_that_really_refuses(tmp_path):
    """The kernel stops the write midway: a limit on file sizes stands in for a full disk."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "could not save step 2" in done.stdout
    assert done.stdout.strip().endswith("step-000001 1")


def test_another_models_checkpoint_is_refused(tmp_path):
    model, optimizer = made()
    path = save(tmp_path, 1, model, optimizer, {}, keep=1)
    wider = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2))
    with pytest.raises(CheckpointError, match=r"0.weight is \(8, 4\), this model's \(9, 4\)"):
        load(path, wider, torch.optim.AdamW(wider.parameters()))
    deeper = nn.Sequential(*model, nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"another model \(parameters such as 2.bias"):
        load(path, deeper, torch.optim.AdamW(deeper.parameters()))


def test_nothing_in_the_package_reads_pickle():
    package = Path(__file__).parents[2] / "tvkd_fast"
    for file in package.rglob("*.py"):
        text = file.read_text()
        assert "torch.load(" not in text, file
        assert "import pickle" not in text, file
        assert "yaml.load(" not in text, file


def test_the_state_is_plain_json(tmp_path):
    model, optimizer = made()
    path = save(tmp_path, 1, model, optimizer, {}, keep=1)
    assert set(json.loads((path / STATE).read_text())) == {"step", "score", "processes", "sha256"}
    assert sorted(p.name for p in path.iterdir()) == sorted([SHARD_OF_ONE, STATE])


@pytest.mark.parametrize("name", objectives())
def test_every_objectives_settings_are_the_same_after_a_save(name, tmp_path):
    kind = objectives()[name]
    tuples = {key: (0.0, 1.0) for key, hint in get_type_hints(kind).items() if "tuple[float, float]" in str(hint)}
    assert "clip" in tuples or name != "adpa"
    settings = kind(**tuples).settings()
    path = save(tmp_path, 2, *made(), {"identity": {"objective": name, "loss": settings}}, keep=1)
    check_same_run(path, {"objective": name, "loss": settings})
    with pytest.raises(CheckpointError, match="made with another loss"):
        check_same_run(path, {"objective": name, "loss": settings | {"else": 1}})
