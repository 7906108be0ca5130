"""Kill a run again and again, and compare what it resumes from, and ends with, with a run that nothing disturbed.

    python -m bench.runs.soak               30 kills of one of two processes, twelve inside a save or an export
    python -m bench.runs.soak --kills 6 --json FILE

A tiny policy is trained over processes of gloo. Some kills come at a random moment; for the others the run is held at a
named place within a save or an export, reports that it has reached it, and is killed there. Before each restart the
newest complete checkpoint is compared, bit for bit, with that of the undisturbed run at the same step; the restart must
report that it resumes from there; and the final models are compared likewise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from bench.harness.machine import made_by, write_report
from tvkd_fast.files import sha256_of
from tvkd_fast.training.checkpoint import STATE, read_state

SAVE_POINTS = ("before its shard", "half a shard", "before the checksums", "before the move", "before old ones go")
EXPORT_POINTS = ("half a model", "before the model moves")
SAVE_EVERY = 2
HELD_FOR_S = 120.0


@dataclass
class Kill:
    """One of them."""

    where: str
    """"anywhere", or the place that the run was held at."""
    rank: int
    step: int
    """The last one that metrics tell of, when it came."""
    resumed_from: int | None = None
    """The newest complete checkpoint afterwards; None where there was none yet."""
    exact: bool = False
    """Whether that is the undisturbed run's, bit for bit, and the restart went on from it."""
    ended_in_s: float = 0.0
    """Seconds until the other processes had ended too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    with TemporaryDirectory() as folder:
        soak = Soak(Path(folder), arguments.processes, arguments.kills, arguments.seed)
        kills, same_end = soak.run()
    exact = sum(kill.exact for kill in kills)
    inside = sum(kill.where != "anywhere" for kill in kills)
    longest = max(kill.ended_in_s for kill in kills)
    report = {
        "kills": [asdict(kill) for kill in kills],
        "processes": arguments.processes,
        "exact": exact,
        "inside": inside,
        "same_end": same_end,
        "longest_end_s": longest,
        "made_by": made_by(),
    }
    print(f"the final model is {'' if same_end else 'NOT '}that of the undisturbed run, bit for bit")
    print(f"{inside} kills inside a save or an export; the other processes ended within {longest:.1f} s")
    print(f"{exact}/{len(kills)} resumed bit-exact")
    write_report(report, arguments.json)
    if exact < len(kills) or not same_end:
        raise SystemExit(1)


class Soak:
    """A run, its undisturbed twin, and what is done to it."""

    def __init__(self, folder: Path, processes: int, kills: int, seed: int) -> None:
        self.folder, self.processes, self.draw = folder, processes, random.Random(seed)
        exports = [EXPORT_POINTS[i % len(EXPORT_POINTS)] for i in range(max(2, kills // 8))]
        saves = [SAVE_POINTS[i % len(SAVE_POINTS)] for i in range(min(kills - len(exports), max(5, kills // 4)))]
        anywhere = ["anywhere"] * (kills - len(exports) - len(saves))
        self.places = self.draw.sample(saves + anywhere, len(saves) + len(anywhere)) + exports
        self.steps = SAVE_EVERY * (2 * kills + 2)
        make_models(folder)

    def run(self) -> tuple[list[Kill], bool]:
        self._recipe("whole", keep=10**6)
        status, _ = self._finish("whole")
        assert status == 0
        self._recipe("killed", keep=2)
        kills: list[Kill] = []
        for place in self.places:
            kill, output = self._killed(place)
            if kills:
                kills[-1].exact &= _resumed_from(kills[-1].resumed_from, output)
            newest = newest_complete(self.folder / "killed" / "checkpoints")
            kill.resumed_from = None if newest is None else int(newest.name.removeprefix("step-"))
            kill.exact = newest is None or same_tensors(newest, self.folder / "whole" / "checkpoints" / newest.name)
            kills.append(kill)
            print(f"kill {len(kills)}: rank {kill.rank}, {kill.where}, after step {kill.step}: {newest}", flush=True)
        status, output = self._finish("killed")
        kills[-1].exact &= _resumed_from(kills[-1].resumed_from, output)
        ends = [sha256_of(self.folder / name / "final" / "model.safetensors") for name in ("whole", "killed")]
        logs = [losses(self.folder / name / "metrics.jsonl") for name in ("whole", "killed")]
        return kills, status == 0 and ends[0] == ends[1] and logs[0] == logs[1]

    def _recipe(self, name: str, *, keep: int) -> None:
        fields = {
            "policy": str(self.folder / "policy"),
            "teacher": str(self.folder / "teacher"),
            "output_dir": str(self.folder / name),
            "data": {"train": str(self.folder / "pairs.jsonl")},
            "optim": {"lr": 1e-3},
            "max_steps": self.steps,
            "pairs_per_step": 6,
            "save_every": SAVE_EVERY,
            "keep_checkpoints": keep,
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(fields))

    def _start(self, name: str, place: str) -> subprocess.Popen[str]:
        for old in self.folder.glob("rank-*"):
            old.unlink()
        (self.folder / "reached").unlink(missing_ok=True)
        code = "import sys; from tvkd_fast.distributed import launch; sys.exit(launch(sys.argv[2:], int(sys.argv[1])))"
        worker = [sys.executable, "-m", "bench.runs.soak", "--worker", str(self.folder), name, place]
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(self.processes), *worker],
            # What a killed process has printed must have left it.
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _finish(self, name: str) -> tuple[int, str]:
        running = self._start(name, "nowhere")
        output, _ = running.communicate(timeout=600)
        if running.returncode:
            print(output)
        return running.returncode, output

    def _killed(self, place: str) -> tuple[Kill, str]:
        running = self._start("killed", place)
        rank = self.draw.randrange(self.processes)
        started_at = newest_step(self.folder / "killed" / "metrics.jsonl")
        if place == "anywhere":
            target = min(self.steps - 1, started_at + self.draw.randrange(1, 2 * SAVE_EVERY + 2))
            self._until(running, lambda: newest_step(self.folder / "killed" / "metrics.jsonl") >= target)
            time.sleep(self.draw.random() * 0.2)
        else:
            self._until(running, (self.folder / "reached").exists)
        step = newest_step(self.folder / "killed" / "metrics.jsonl")
        os.kill(int((self.folder / f"rank-{rank}").read_text()), signal.SIGKILL)
        since = time.monotonic()
        output, _ = running.communicate(timeout=60)
        assert running.returncode, "a killed run must not look like a finished one"
        return Kill(place, rank, step, ended_in_s=time.monotonic() - since), output

    def _until(self, running: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
        while not ready():
            if running.poll() is not None:
                raise RuntimeError(f"the run ended before it was killed:\n{running.communicate()[0]}")
            time.sleep(0.005)


def _resumed_from(step: int | None, output: str) -> bool:
    line = next((line for line in output.splitlines() if "resuming from" in line), None)
    return line is None if step is None else line is not None and line.endswith(f"step-{step:06d}")


def newest_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint whose checksums match, read here and not by the code that is tested."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if (path / STATE).exists():
            recorded = read_state(path)["sha256"]
            if all((path / n).exists() and sha256_of(path / n) == digest for n, digest in recorded.items()):
                return path
    return None


def same_tensors(path: Path, other: Path) -> bool:
    """Return whether two checkpoints hold the same weights, moments and generators, bit for bit, in whatever order."""
    for name in read_state(path)["sha256"]:
        mine, theirs = (load_file(folder / name) for folder in (path, other))
        if mine.keys() != theirs.keys() or not all(torch.equal(x, theirs[key]) for key, x in mine.items()):
            return False
    return True


def newest_step(metrics: Path) -> int:
    """The last step that a log tells of; 0 without one."""
    return max(losses(metrics), default=0)


def losses(metrics: Path) -> dict[int, float]:
    """Return the losses by step."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    found = {}
    for text in lines:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        found[line["step"]] = line["loss"]
    return found


def make_models(folder: Path) -> None:
    """A policy, a teacher and pairs, of a few thousand parameters and words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = ["<s>", "</s>", *(f"w{i}" for i in range(60))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    for seed, role in enumerate(("policy", "teacher")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    draw = random.Random(0)

    def some(count: int) -> str:
        return " ".join(draw.choices(words[2:], k=count))

    rows: Iterator[dict[str, Any]] = ({"prompt": some(4), "chosen": some(5), "rejected": some(3)} for _ in range(60))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def work(arguments: list[str]) -> None:
    """Run `tvkd train` in a process of the run, stopped where it is to be killed."""
    from tvkd_fast.cli.parser import load_recipe
    from tvkd_fast.commands.train import train

    folder, name, place = Path(arguments[0]), arguments[1], arguments[2]
    torch.set_num_threads(1)
    (folder / f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
    hold_at(place, folder / "reached")
    train(load_recipe(str(folder / f"{name}.yaml")))


def hold_at(place: str, reached: Path) -> None:
    """Let the run report that it has reached a place, and wait there to be killed."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    from tvkd_fast import files
    from tvkd_fast.training import checkpoint, final

    def hold() -> None:
        reached.touch()
        time.sleep(HELD_FOR_S)

    def before(owner: Any, function: str) -> None:
        real = getattr(owner, function)

        def held(*arguments: Any, **options: Any) -> Any:
            hold()
            return real(*arguments, **options)

        setattr(owner, function, held)

    def after_half(owner: Any, function: str, folder_of: Callable[..., Path]) -> None:
        real = getattr(owner, function)

        def held(*arguments: Any, **options: Any) -> Any:
            found = real(*arguments, **options)
            for file in folder_of(*arguments).glob("*.safetensors"):
                os.truncate(file, file.stat().st_size // 2)
            hold()
            return found

        setattr(owner, function, held)

    if place == "before its shard":
        before(HuggingFaceStorageWriter, "write_data")
    elif place == "half a shard":
        after_half(HuggingFaceStorageWriter, "write_data", lambda writer, *_: Path(writer.path))
    elif place == "before the checksums":
        real_sum = checkpoint.sha256_of

        def held_sum(path: Path) -> str:
            if ".partial" in str(path):
                hold()
            return real_sum(path)

        checkpoint.sha256_of = held_sum
    elif place == "before the move":
        before(checkpoint, "_flush")
    elif place == "before old ones go":
        before(checkpoint.Checkpoints, "_prune")
    elif place == "half a model":
        after_half(final, "save_model", lambda model, tokenizer, partial, *_: Path(partial))
    elif place == "before the model moves":
        before(files, "put_in_place")


if __name__ == "__main__":
    main()
