"""Checkpoints that are complete or invisible: safetensors and JSON, written beside their place and moved there.

A checkpoint is a folder `step-000100` of one file per process, `shard-00001-….safetensors`, each with its own rows of
weights and optimizer (torch.distributed.checkpoint's sharded layout, which any number of processes reads), and
`state.json`, whose checksums of them make it whole. What is not whole is passed over, and the one before it is used.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tvkd_fast.distributed import World
from tvkd_fast.files import sha256_of

STATE = "state.json"
SHARD_OF_ONE = "shard-00001-model-00001-of-00001.safetensors"
MODEL, OPTIMIZER, RNG = "model", "optimizer", "rng"
BESIDE = "beside"
"""The attribute of a policy that holds what is trained with it and is no part of its model."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what is left."""


class Checkpoints:
    """The checkpoints of a run; every process of its world calls every method.

    Args:
        folder: where they lie.
        world: the processes that share weights and optimizer.
        keep: how many of the newest stay, beside the best.
    """

    def __init__(self, folder: Path, world: World, *, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: tuple[int, Future[None]] | None = None
        self._bytes = 0

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None. One that is not whole is named in a warning and passed over."""
        for path in self.world.broadcast(_checkpoints(self.folder)):
            flaw = self.flaw(path)
            if flaw is None:
                return path
            if self.world.first:
                warnings.warn(f"{path} is not a whole checkpoint ({flaw}); looking at the one before it", stacklevel=2)
        return None

    def best(self) -> Path | None:
        """Return the checkpoint with the largest finite score, or None where no score is finite."""
        return _best(_checkpoints(self.folder))

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, Any],
        *,
        score: float | None = None,
    ) -> None:
        """Begin to write `step-NNNNNN` with weights, optimizer, generators and `extra`; training may go on meanwhile.

        `score` is what the best is chosen by, larger being better; one that is NaN or inf is never the best. Once it is
        whole, all but the newest `keep` and the best are dropped. CheckpointError here or at the next call or `wait`,
        where the disk will not take it; earlier checkpoints are as they were.
        """
        self.wait()
        tensors = state_of(model, optimizer, self.world)
        self._bytes = sum(x.numel() * x.element_size() for x in tensors.values())
        partial = self.folder / f".step-{step:06d}.partial"
        self._agree(step, self._clear if self.world.first else None, partial)
        score = score if _comparable(score) else None
        state = {"step": step, "score": score, "processes": self.world.size, **extra}
        self._saving = step, self._saver.submit(self._write, _staged(tensors, partial, self.world), partial, state)

    def wait(self) -> None:
        """Wait until the checkpoint that is being saved is in place. Raises CheckpointError where that failed."""
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        self._agree(step, saving.result)

    def close(self) -> None:
        """End the thread that saves."""
        self._saver.shutdown(wait=True)

    def _agree(self, step: int, act: Callable[..., Any] | None, *arguments: Any) -> None:
        """Call `act`, and raise in every process an error of any of them."""
        problem = None
        try:
            if act is not None:
                act(*arguments)
        except (OSError, SafetensorError, dcp.CheckpointException) as error:
            problem = _reason(error)
        problem = next((text for text in self.world.all_gather(problem) if text is not None), None)
        if problem is None:
            return
        if self.world.first:
            shutil.rmtree(self.folder / f".step-{step:06d}.partial", ignore_errors=True)
        left = self.newest()
        raise CheckpointError(
            f"could not save step {step} to {self.folder}: {problem}. Free some space (a checkpoint of this run takes "
            f"{self._bytes / 2**20:,.0f} MB) and run the same command again; "
            + (f"{left.name} is kept and will be resumed from" if left else "there is no earlier checkpoint")
        )

    def _clear(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".step-*.partial*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()

    def _write(self, write: Callable[[], None], partial: Path, state: dict[str, Any]) -> None:
        """Write this process's shard, in the saving thread; the first process then writes all checksums."""
        write()
        problem, sums = None, {}
        try:
            for shard in partial.glob(f"shard-{self.world.rank + 1:05d}-*"):
                sums[shard.name] = sha256_of(shard)
                _flush(shard)
        except OSError as error:
            problem = str(error)
        gathered = self.world.all_gather((problem, sums), behind=True)
        problem = next((text for text, _ in gathered if text is not None), None)
        if problem is not None:
            raise OSError(problem)
        if not self.world.first:
            return
        state["sha256"] = {name: digest for _, found in gathered for name, digest in found.items()}
        missing = [name for name in state["sha256"] if not (partial / name).exists()]
        if missing or len(state["sha256"]) < self.world.size:
            raise OSError(
                f"{', '.join(missing) or 'a shard'} is not here: --output_dir must be one folder for all machines"
            )
        (partial / STATE).write_text(json.dumps(state, indent=2) + "\n")
        _flush(partial / STATE)
        _flush(partial)
        target = self.folder / f"step-{state['step']:06d}"
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _flush(self.folder)
        self._prune(state["step"])

    def _prune(self, step: int) -> None:
        # A later folder is damaged, or this run would have resumed from it: it neither counts nor is it ours to drop.
        mine = [path for path in _checkpoints(self.folder) if _step(path) <= step]
        best = _best(mine)
        for old in mine[self.keep :]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)

    def flaw(self, path: Path) -> str | None:
        """Return why a checkpoint is not whole, or None. Every process checks its part, and all get the same answer."""
        try:
            recorded = read_state(path)["sha256"]
            mine = sorted(recorded)[self.world.rank :: self.world.size]
            flaw = next((f"{n} does not match its checksum" for n in mine if sha256_of(path / n) != recorded[n]), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            flaw = f"{type(error).__name__}: {error}"
        return next((text for text in self.world.all_gather(flaw) if text is not None), None)

    def load_weights(self, path: Path, model: nn.Module) -> None:
        """Load the trained weights into a model as it was at the start, and nothing else; what was trained beside it is
        left out."""
        reader, saved = _opened(path)
        saved = {name: size for name, size in saved.items() if not name.startswith(f"{MODEL}/{BESIDE}.")}
        parameters = _parameters(model)
        _check_same_model(path, saved, parameters)
        self._read({f"{MODEL}/{name}": parameter.detach() for name, parameter in parameters.items()}, reader)

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put weights, optimizer state and this process's generators back, bit for bit.

        The checkpoint may be of another number of processes; generators without a saved state stay as they are.
        """
        reader, saved = _opened(path)
        parameters = _parameters(model)
        _check_same_model(path, saved, parameters)
        optimizer.state.clear()
        for name, shape in saved.items():
            kind, _, rest = name.partition("/")
            if kind == OPTIMIZER:
                parameter_name, key = rest.rsplit("/", 1)
                parameter = parameters[parameter_name]
                optimizer.state[parameter][key] = (
                    torch.zeros_like(parameter)
                    if shape == parameter.shape
                    else torch.zeros(shape, device=parameter.device)
                )
        own = f"{RNG}/{self.world.rank}/"
        wanted = {name: x for name, x in state_of(model, optimizer, self.world).items() if not name.startswith(own)}
        wanted |= {name: torch.zeros(size, dtype=torch.uint8) for name, size in saved.items() if name.startswith(own)}
        self._read(wanted, reader)
        _restore_generators({name.removeprefix(own): x for name, x in wanted.items() if name.startswith(own)})

    def _read(self, wanted: dict[str, Tensor], reader: HuggingFaceStorageReader) -> None:
        with warnings.catch_warnings():
            # A world of one is no distributed one, as torch then warns.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(wanted, storage_reader=reader, process_group=self.world.host)


def _opened(path: Path) -> tuple[HuggingFaceStorageReader, dict[str, torch.Size]]:
    """Open a checkpoint, and return a reader of it and the sizes of its tensors."""
    reader = HuggingFaceStorageReader(str(path))
    entries = reader.read_metadata().state_dict_metadata.items()
    return reader, {name: entry.size for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Tensor]:
    """Return the tensors that a process saves: its shards of weights and optimizer, by name, and its generators."""
    parameters = _parameters(model)
    tensors = {f"{MODEL}/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{OPTIMIZER}/{name}/{key}"] = value.detach()
    return tensors | {f"{RNG}/{world.rank}/{name}": x for name, x in _generators().items()}


def read_state(path: Path) -> dict[str, Any]:
    """Read `state.json`: `step`, `score`, `processes`, checksums, and the caller's `extra`."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def check_same_run(path: Path, identity: Mapping[str, Any]) -> None:
    """Raises CheckpointError, with what differs, where the checkpoint is of another run than this one."""
    found = dict(read_state(path)["identity"])
    # As the checkpoint reads it back, with lists for tuples.
    identity = json.loads(json.dumps(identity))
    if isinstance(found.get("loss"), dict) and found.get("objective") == identity.get("objective"):
        # Before objectives had settings of their own, every run recorded all of TVKD's.
        found["loss"] = {key: x for key, x in found["loss"].items() if key in identity.get("loss", {})}
    for name, value in identity.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"{path} was made with another {name} ({_changed(found.get(name), value)}): give --output_dir a folder "
                "of its own, or --resume false to start again there"
            )


def _changed(before: Any, now: Any) -> str:
    """Describe the values that differ, and only those."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{before}, now {now}"
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)}, now {now.get(name)}" for name in names)


def set_aside(path: Path) -> None:
    """Move what an earlier run left out of the way of one that starts again; nothing is deleted, and an empty folder,
    which holds nothing to keep, stays where it is."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.before-{number}")).exists():
        number += 1
    path.rename(aside)


def _staged(tensors: dict[str, Tensor], partial: Path, world: World) -> Callable[[], None]:
    """Return a function that writes the tensors as they are now, however they change until it is called."""
    if world.mesh is None:
        copies = {name: x.to("cpu", copy=True) for name, x in tensors.items()}
        return lambda: save_file(copies, partial / SHARD_OF_ONE)
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    saving = dcp.async_save(tensors, storage_writer=writer, process_group=world.background)
    assert isinstance(saving, Future)
    return lambda: saving.result() and None


def _check_same_model(path: Path, saved: Mapping[str, torch.Size], parameters: Mapping[str, Tensor]) -> None:
    shapes = {name.removeprefix(f"{MODEL}/"): size for name, size in saved.items() if name.startswith(f"{MODEL}/")}
    if shapes.keys() != parameters.keys():
        odd = sorted(shapes.keys() ^ parameters.keys())[:4]
        raise CheckpointError(
            f"{path} is of another model (parameters such as {', '.join(odd)}): give --output_dir a folder of its own"
        )
    for name, parameter in parameters.items():
        if parameter.shape != shapes[name]:
            raise CheckpointError(
                f"{path}: {name} is {tuple(shapes[name])}, this model's {tuple(parameter.shape)}: give "
                "--output_dir a folder of its own"
            )


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)]
    return sorted(found, key=_step, reverse=True)


def _best(paths: list[Path]) -> Path | None:
    """Return the best of the checkpoints, which come newest first. Only scores by the same figure on the same held-out
    pairs as the newest scored checkpoint's are compared."""
    scored = {path: state for path in paths if _comparable((state := _state_or_nothing(path)).get("score"))}
    of = next((state.get("scored_on") for state in scored.values()), None)
    same = [path for path in scored if scored[path].get("scored_on") == of]
    return max(same, key=lambda path: scored[path]["score"], default=None)


def _comparable(score: Any) -> bool:
    """Return whether a score can be larger or smaller than another: NaN, which compares with nothing, is neither."""
    return isinstance(score, int | float) and math.isfinite(score)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _state_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return read_state(path)
    except (OSError, ValueError):
        return {}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _generators() -> dict[str, Tensor]:
    """Return the states of this process's generators, as bytes."""
    version, internal, gauss = random.getstate()
    python = json.dumps([version, list(internal), gauss]).encode()
    states = {"torch": torch.get_rng_state(), "python": torch.frombuffer(bytearray(python), dtype=torch.uint8)}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_generators(states: Mapping[str, Tensor]) -> None:
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    if "python" in states:
        version, internal, gauss = json.loads(bytes(states["python"].tolist()))
        random.setstate((version, tuple(internal), gauss))


def _reason(error: BaseException) -> str:
    """Describe the error in one line; of the errors that DCP gathers from several processes, the first."""
    if isinstance(error, dcp.CheckpointException):
        return next(str(wrapped[0]) for wrapped in error.failures.values())
    return str(error)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
