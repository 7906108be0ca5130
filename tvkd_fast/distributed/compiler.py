"""The backbone's blocks through torch.compile: norms, rotations and activations of a block become a few passes.

The head is not: its passes are compiled already. Nor is attention over packed rows, whose layout is other numbers in
every batch; it runs between two compiled parts of its block.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from tvkd_fast.distributed.shard import blocks_of
from tvkd_fast.models import PolicyWithHead
from tvkd_fast.models.shared_prompt import keep_uncompiled

REMEDY = "leave --model.compile out"


def compile_blocks(policy: PolicyWithHead) -> None:
    """Compile every block, for rows of any length; all of a kind are compiled once, as the first of them is called.

    To be called after `checkpoint_activations`, which goes around the compiled block, and before the policy is sharded.
    Gradients are the same to rounding. Raises ValueError where the backbone's blocks cannot be found.
    """
    keep_uncompiled(policy.model)
    for block in blocks_of(policy, REMEDY):
        # In place, so that parameters keep their names.
        block.compile(dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile finds no compiler for this device on this machine."""
    if device.type == "cpu":
        named, usual = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    else:
        named, usual = "CC", ["cc", "gcc", "clang"]
        if find_spec("triton") is None:
            raise ValueError(f"torch.compile writes Triton for a {device.type} device: pip install triton, or {REMEDY}")
    given = os.environ.get(named)
    if not any(shutil.which(name) for name in ([given] if given else usual)):
        raise ValueError(
            f"torch.compile needs a compiler, and {given or usual[-1]} is not here: install it, or name another in "
            f"{named}, or {REMEDY}"
        )
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        raise ValueError(
            f"torch.compile needs Python's headers, and {include} has no Python.h: install python3-dev, or {REMEDY}"
        )
