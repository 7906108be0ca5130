"""`tvkd export`: a model out of a checkpoint, as `final/` is one of the last step."""

from __future__ import annotations

from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

from tvkd_fast.commands.models import load_policy
from tvkd_fast.distributed import World, full_weights
from tvkd_fast.files import ready_folder
from tvkd_fast.models import fingerprint_model, is_adapter, load_tokenizer, merged
from tvkd_fast.models.settings import ModelConfig
from tvkd_fast.training.checkpoint import Checkpoints, read_state
from tvkd_fast.training.final import save_final
from tvkd_fast.training.record import from_record
from tvkd_fast.training.summary import model_card
from tvkd_fast.training.train_config import TrainConfig
from tvkd_fast.training.trainer import CHECKPOINTS

EXPORTED = "exported"
"""The folder inside a run's that exported models go to by default."""


def export(
    checkpoint: str | Path,
    folder: str | Path | None = None,
    *,
    policy: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Make a folder that `from_pretrained` loads, tokenizer included and adapters merged, of a run's step-NNNNNN.

    `folder` is OUTPUT_DIR/exported/step-NNNNNN where not given, and `policy` the place of the run's policy, where that
    is another now. Raises ValueError where there is no whole checkpoint, where the policy is not the one that the run
    was of, and where `folder` is not empty.
    """
    path = Path(expanduser(checkpoint))
    config, step = _run_of(path)
    if policy is not None:
        config = replace(config, policy=str(policy))
    target = path.resolve().parents[1] / EXPORTED / path.name if folder is None else Path(expanduser(folder))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: give another folder, or remove it")
    ready_folder(target.parent)
    world = World(torch.device("cpu"))
    checkpoints = Checkpoints(path.parent, world, keep=1)
    flaw = checkpoints.flaw(path)
    if flaw is not None:
        raise ValueError(f"{path} is not a whole checkpoint ({flaw}): take another one")
    # A file does not decide that code from a hub is run.
    model = ModelConfig(dtype=config.model.dtype, packing="padded", device="cpu", trust_remote_code=trust_remote_code)
    try:
        tokenizer = load_tokenizer(config.policy, trust_remote_code=trust_remote_code)
        start = load_policy(config.policy, model, layers=config.student_layers, lora=config.lora)
    except ValueError as error:
        raise ValueError(f"the policy that {path} was trained from: {error}. --policy says where it is now") from error
    if read_state(path)["identity"].get("policy") not in (None, fingerprint_model(start.model)):
        raise ValueError(
            f"{config.policy} is another model than the one that {path} was trained from: give that one by --policy"
        )
    checkpoints.load_weights(path, start)
    card = model_card(replace(config, max_steps=step), None)
    if any(is_adapter(name) for name, _ in start.named_parameters()):
        save_final(*merged(start.model, full_weights(start)), tokenizer, target, card)
    else:
        save_final(start.model, None, tokenizer, target, card)
    return target


def _run_of(path: Path) -> tuple[TrainConfig, int]:
    """The run that a checkpoint is of, and its step."""
    try:
        state = read_state(path)
        config: dict[str, Any] = state["config"]
        # Which checkpoints a run keeps does not concern an export of one of them.
        return from_record(TrainConfig, config | {"keep_best": "none"}), int(state["step"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        steps = [*path.glob("step-*"), *path.glob(f"{CHECKPOINTS}/step-*")]
        there = f"; there is {max(steps)}" if steps else ""
        raise ValueError(f"{path} is no whole checkpoint: give OUTPUT_DIR/checkpoints/step-NNNNNN{there}") from error
