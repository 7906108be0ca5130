"""Commands that are given a folder, a file or a name, and no config."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from tvkd_fast.scoring.cache import describe


def scores(arguments: list[str]) -> None:
    """`tvkd scores FOLDER`, or a file in it: what is in a score cache, once every byte matches its checksum."""
    _usage(arguments, "tvkd scores FOLDER: what is in a folder that `tvkd score` wrote", maximum=1)
    path = Path(os.path.expanduser(arguments[0]))
    print(describe(path.parent if path.is_file() else path))


def replay(arguments: list[str]) -> None:
    """`tvkd replay FILE`: the pairs of a step that was not finite, one by one."""
    from tvkd_fast.commands.replay import replay as replay_record
    from tvkd_fast.commands.replay import report

    _usage(arguments, "tvkd replay OUTPUT_DIR/nonfinite-step-NNNNNN.json: the step's pairs, one by one", maximum=1)
    print(report(replay_record(arguments[0])))


def plot(arguments: list[str]) -> None:
    """`tvkd plot RUN ...` draws the curves of runs over each other."""
    from tvkd_fast.commands.plot import plot_runs

    _usage(arguments, "tvkd plot OUTPUT_DIR [OUTPUT_DIR ...]: draws their curves as curves.png in the first")
    print(plot_runs([Path(os.path.expanduser(folder)) for folder in arguments]))


def export(arguments: list[str]) -> None:
    """`tvkd export CHECKPOINT [FOLDER]`: a model of a run's checkpoint, that `from_pretrained` loads."""
    from tvkd_fast.commands.export import export as export_checkpoint

    parser = argparse.ArgumentParser(
        prog="tvkd export",
        allow_abbrev=False,
        description="Make a model of a run's checkpoint, as final/ is one of its last step: weights, tokenizer, and "
        "adapters merged, in a folder that AutoModelForCausalLM.from_pretrained loads.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="OUTPUT_DIR/checkpoints/step-NNNNNN of a run")
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", help="where to; OUTPUT_DIR/exported/step-NNNNNN if not given"
    )
    parser.add_argument("--output_dir", metavar="FOLDER", help="the same as FOLDER")
    parser.add_argument("--policy", metavar="MODEL", help="the run's policy, where it is not where it was any longer")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a hub model")
    given = parser.parse_args(arguments)
    if given.folder is not None and given.output_dir is not None:
        parser.error("FOLDER and --output_dir are one: give one of them")
    folder = given.folder or given.output_dir
    trust = given.trust_remote_code
    print(export_checkpoint(given.checkpoint, folder, policy=given.policy, trust_remote_code=trust))


def _usage(arguments: list[str], usage: str, *, maximum: int = 10**6) -> None:
    if 1 <= len(arguments) <= maximum and not any(argument.startswith("-") for argument in arguments):
        return
    print(f"usage: {usage}", file=sys.stderr)
    raise SystemExit(0 if arguments == ["--help"] else 2)


WITHOUT_OPTIONS: dict[str, Callable[[list[str]], None]] = {
    "scores": scores,
    "replay": replay,
    "plot": plot,
    "export": export,
}
"""Commands that are given a folder or a file."""

BENCHMARKS = {
    "head": "bench.head",
    "values": "bench.head.values",
    "step": "bench.step",
    "divergence": "bench.divergence",
    "rollout": "bench.rollout",
}
"""The modules of the checkout's bench/ that `tvkd bench` runs, by name."""


def bench(arguments: list[str]) -> None:
    """`tvkd bench NAME ...` runs a benchmark of the checkout that this package lies in."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "head").is_dir():
        print("tvkd bench: error: the benchmarks are no part of a wheel: run it from a checkout", file=sys.stderr)
        raise SystemExit(2)
    if arguments[:1] not in ([name] for name in BENCHMARKS):
        print(f"tvkd bench: error: name one of {', '.join(BENCHMARKS)}; tvkd bench head --help", file=sys.stderr)
        raise SystemExit(2)
    name, *rest = arguments
    sys.path.insert(0, str(root))
    sys.argv = [name, *rest]
    runpy.run_module(BENCHMARKS[name], run_name="__main__", alter_sys=True)
