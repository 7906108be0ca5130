import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(model_folder: Any, write_jsonl: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return the report of a benchmark on a tiny model and forty short pairs, run as users run it."""

    def run(module: str, *arguments: str) -> dict[str, Any]:
        rows = [
            {"prompt": f"{i} is", "chosen": "odd" if i % 2 else "even", "rejected": "a number " * 9} for i in range(40)
        ]
        command = [sys.executable, "-W", "ignore", "-m", f"bench.{module}", *arguments, "--model", model_folder()]
        command += ["--data", str(write_jsonl(rows)), "--json", "report.json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / "report.json").read_text())

    return run
