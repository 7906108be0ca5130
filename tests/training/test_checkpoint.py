import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tvkd_fast.training.checkpoint import (
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)


def made(steps=2, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(steps):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def one_more(model, optimizer):
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()] + [random.random()]


def test_what_comes_back_goes_on_bit_for_bit(tmp_path):
    model, optimizer = made()
    random.seed(5)
    path = save_checkpoint(tmp_path, 2, model, optimizer, {"note": [1, "a"]}, keep=2)
    expected = one_more(model, optimizer)
    fresh, fresh_optimizer = made(steps=1, seed=9)
    random.seed(99)
    load_checkpoint(path, fresh, fresh_optimizer)
    got = one_more(fresh, fresh_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(expected[:-1], got[:-1], strict=True))
    assert expected[-1] == got[-1]
    assert read_state(path)["note"] == [1, "a"]
    assert read_state(path)["step"] == 2


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = made()
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000009", "step-000010"]
    assert newest_checkpoint(tmp_path).name == "step-000010"


def test_a_damaged_later_one_neither_counts_nor_goes(tmp_path):
    model, optimizer = made()
    damaged = save_checkpoint(tmp_path, 6, model, optimizer, {}, keep=1) / MODEL
    damaged.write_bytes(b"")
    for step in (2, 4):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000006"]
    with pytest.warns(UserWarning, match="step-000006 is not a whole checkpoint"):
        assert newest_checkpoint(tmp_path).name == "step-000004"


def test_no_folder_is_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
@pytest.mark.parametrize("damage", ["missing", "torn", "flipped"])
def test_a_half_written_checkpoint_is_passed_over(name, damage, tmp_path):
    model, optimizer = made()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=3)
    path = save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=3) / name
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
        assert newest_checkpoint(tmp_path).name == "step-000001"


def test_a_save_that_was_killed_is_invisible_and_cleared_later(tmp_path):
    model, optimizer = made()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=3)
    shutil.copytree(path, tmp_path / ".step-000002.partial-1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(tmp_path) == path
    save_checkpoint(tmp_path, 3, model, optimizer, {}, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch):
    model, optimizer = made()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tvkd_fast.training.checkpoint.save_file", full)
    message = r"could not save step 2 .*No space left on device.*Free some space .*step-000001 is kept"
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
from tvkd_fast.training.checkpoint import CheckpointError, newest_checkpoint, save_checkpoint
model = nn.Linear(256, 256)
optimizer = torch.optim.AdamW(model.parameters())
folder = Path(sys.argv[1])
save_checkpoint(folder, 1, model, optimizer, {}, keep=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_checkpoint(folder, 2, model, optimizer, {}, keep=1)
except CheckpointError as error:
    print(error)
print(newest_checkpoint(folder).name, len(list(folder.iterdir())))
"""


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX's")
def test_a_disk_that_really_refuses(tmp_path):
    """The kernel stops the write midway: a limit on file sizes stands in for a full disk."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "could not save step 2" in done.stdout
    assert done.stdout.strip().endswith("step-000001 1")


def test_another_models_checkpoint_is_refused(tmp_path):
    model, optimizer = made()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=1)
    wider = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2))
    with pytest.raises(CheckpointError, match=r"0.weight is \(8, 4\), this model's \(9, 4\)"):
        load_checkpoint(path, wider, torch.optim.AdamW(wider.parameters()))
    deeper = nn.Sequential(*model, nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"another model \(parameters such as 2.bias"):
        load_checkpoint(path, deeper, torch.optim.AdamW(deeper.parameters()))


def test_nothing_in_the_package_reads_pickle():
    package = Path(__file__).parents[2] / "tvkd_fast"
    for file in package.rglob("*.py"):
        text = file.read_text()
        assert "torch.load(" not in text, file
        assert "import pickle" not in text, file
        assert "yaml.load(" not in text, file


def test_the_state_is_plain_json(tmp_path):
    model, optimizer = made()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=1)
    assert set(json.loads((path / STATE).read_text())) == {"step", "rng", "sha256"}
    assert sorted(p.name for p in path.iterdir()) == sorted([MODEL, OPTIMIZER, STATE])
