"""The path of a call through the package, recorded while it runs: which functions of which files, in order."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from tvkd_fast import linear_logps

PACKAGE = Path(__file__).parents[2]
OURS = ("tvkd_fast", "kernels")


@dataclass(frozen=True)
class Frame:
    """A function on the path."""

    file: str
    """The path within the package's folder, such as `training/step.py`."""
    function: str


class _ArrivedError(Exception):
    pass


def path_to_a_kernel(run: Callable[[], Any]) -> list[Frame]:
    """The frames of this package between `run` and the launch of the first Triton kernel."""
    from tvkd_fast.kernels import launch
    from tvkd_fast.ops import dispatch

    found: list[Frame] = []
    real = launch.launch

    def arrived(*_: Any, **__: Any) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            relative = _inside(frame.f_code.co_filename)
            if relative is not None:
                found.append(Frame(relative, frame.f_code.co_qualname))
            frame = frame.f_back
        found.reverse()
        raise _ArrivedError

    # The launchers have imported the function by its name.
    launchers = [module for name, module in sys.modules.items() if name.startswith("tvkd_fast.kernels.")]
    patches: list[Any] = [
        patch.object(module, "launch", arrived) for module in launchers if vars(module).get("launch") is real
    ]
    patches.append(patch.object(dispatch, "_prefers_triton", return_value=True))
    for one in patches:
        one.start()
    try:
        run()
    except _ArrivedError:
        return [*found, Frame("kernels/launch.py", "launch")]
    finally:
        for one in patches:
            one.stop()
    raise AssertionError("no kernel was launched")


def _inside(file: str) -> str | None:
    path = Path(file)
    if not path.is_absolute() or PACKAGE not in path.parents:
        return None
    parts = path.relative_to(PACKAGE).parts
    if parts[0] not in OURS:
        return None
    return "/".join(parts if parts[0] == "kernels" else parts[1:])


def files(path: list[Frame]) -> list[str]:
    """Return the files of a path of calls, each once, in the order in which it reaches them."""
    return list(dict.fromkeys(frame.file for frame in path))


def linear_logps_path() -> list[Frame]:
    """Return the calls from `linear_logps` to its kernel."""
    import tvkd_fast.ops.triton_backend  # noqa: F401

    hidden, weight = torch.zeros(2, 16), torch.zeros(32, 16, requires_grad=True)
    return path_to_a_kernel(lambda: linear_logps(hidden, weight, torch.zeros(2, dtype=torch.int64)))


def batch_path() -> list[Frame]:
    """Return the calls from the trainer of a tiny run to the kernel that its first batch reaches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import tvkd_fast.ops.triton_walk  # noqa: F401
    from tvkd_fast.data import PairDataset, TokenizedPair, TokenReport
    from tvkd_fast.models import PolicyWithHead
    from tvkd_fast.scoring import OnlineScorer
    from tvkd_fast.training.train_config import TrainConfig
    from tvkd_fast.training.trainer import Trainer

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    pairs = PairDataset(
        [TokenizedPair([1, 2], [3, 4], [5, 6], True, True, "row 0")], TokenReport("tiny", 1, 8, "keep_start")
    )
    with TemporaryDirectory() as folder:
        config = TrainConfig(policy="tiny", output_dir=folder, objective="sft", pairs_per_step=1, max_steps=1)
        policy = PolicyWithHead(model, packing="shared")
        trainer = Trainer(config, policy, OnlineScorer(None, None), pairs, show_progress=False)
        return path_to_a_kernel(trainer.run)
