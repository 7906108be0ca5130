"""The layout of the package: files and folders of one idea, few frames to a kernel, objectives known in one place."""

import re
from collections import Counter
from pathlib import Path

from bench.architecture.calls import batch_path, files, linear_logps_path
from bench.architecture.imports import ROOT, python_files
from tvkd_fast.objectives import objectives
from tvkd_fast.ops.joint.outputs import KINDS

PACKAGE = ROOT / "tvkd_fast"
FILES = sorted(python_files(PACKAGE))
BELOW = ("ops/", "fused/", "kernels/", "distributed/")
TRLS_OWN = {"integrations/trl.py", "integrations/trl_config.py"}
"""The files with TRL's names of losses, tags and choices, some of which are spelt like objectives."""


def relative(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_no_file_is_long_and_no_folder_full() -> None:
    assert [relative(file) for file in FILES if len(file.read_text().splitlines()) > 400] == []
    folders = Counter(file.parent for file in FILES)
    assert {str(folder): count for folder, count in folders.items() if count > 16 and folder.name != "kernels"} == {}


def test_no_two_files_have_one_name() -> None:
    names = Counter(file.name for file in FILES if file.name not in ("__init__.py", "__main__.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_objectives_are_named_in_their_folder_alone() -> None:
    quoted, of_ops = (
        re.compile("|".join(rf'"{name}"' for name in names)) for names in (objectives(), set(objectives()) - set(KINDS))
    )
    # A divergence has its name from the ops, and an objective that is one and nothing else has it too.
    named = {
        relative(file)
        for file in FILES
        if (of_ops if relative(file).startswith(BELOW) else quoted).search(file.read_text())
    }
    assert {name for name in named if not name.startswith("objectives/")} - TRLS_OWN == set()


def test_a_call_comes_to_its_kernel_in_five_frames() -> None:
    assert len(linear_logps_path()) <= 5


def test_a_batch_comes_to_a_kernel_through_ten_files() -> None:
    path = files(batch_path())
    assert path[0] == "training/trainer.py"
    assert path[-1] == "kernels/launch.py"
    assert len(path) <= 10
