"""What a run wrote of its losses, and whether one that lost its newest checkpoint comes to the same end."""

from pathlib import Path
from typing import Any

import pytest

from tvkd_fast.models import fingerprint_weights, load_model
from tvkd_fast.training.metrics import METRICS, read_metrics


def losses(config: Any) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(config.output_dir) / METRICS) if "loss" in line]


def check_resumes(make_config: Any, run: Any, files: Path, **settings: Any) -> None:
    """Runs `files`/whole and `files`/cut, which loses its last checkpoint and is run again: same losses and weights."""
    whole, cut = (make_config(output_dir=str(files / name), save_every=3, **settings) for name in ("whole", "cut"))
    run(whole)
    run(cut)
    for file in (files / "cut" / "checkpoints" / "step-000006").iterdir():
        file.unlink()
    with pytest.warns(UserWarning, match="step-000006 is not a whole checkpoint"):
        run(cut)
    assert losses(whole) == losses(cut)
    finals = [fingerprint_weights(load_model(files / name / "final")) for name in ("whole", "cut")]
    assert finals[0] == finals[1]
