"""`tvkd score | train | eval | explain | demo | bench`: a config is a command's options, a recipe a YAML of them."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from tvkd_fast.data import describe
from tvkd_fast.data.scores import check_score_folder
from tvkd_fast.distributed import check_replicas, launch
from tvkd_fast.training.checkpoint import CheckpointError
from tvkd_fast.training.config import EvalConfig, ExplainConfig, ScoreConfig, TrainConfig
from tvkd_fast.training.options import hint, in_options
from tvkd_fast.training.outputs import in_a_line, written
from tvkd_fast.training.road import DemoConfig
from tvkd_fast.training.stop import Stopped
from tvkd_fast.version import __version__

COMMANDS: dict[str, tuple[type, str]] = {
    "score": (ScoreConfig, "run teacher and reference once over the data and keep one float a state"),
    "train": (TrainConfig, "train a policy by tvkd, dpo or sft"),
    "eval": (EvalConfig, "evaluate a policy, or several (--model A --model B), on preference pairs (--data PAIRS)"),
    "explain": (ExplainConfig, "draw what a teacher's value does, token by token, over the two responses of a pair"),
    "demo": (DemoConfig, "walk the whole road on this machine: teacher, student, scores, TVKD and DPO, table, picture"),
}
BENCHMARKS = {"head": "bench.head", "values": "bench.head.values", "step": "bench.step"}
"""What `tvkd bench` runs of the checkout's bench/, by name."""
_NAMES = (*COMMANDS, "scores", "replay", "plot", "bench", "export")
_SWITCHES = ("--dry_run", "--quick")


class Parser(ArgumentParser):
    """Short errors that say what to type instead."""

    known: tuple[str, ...] = ()
    """Options of the command; of the outer parser none."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # An error in a YAML file reaches the outer parser, which names the command in the message.
        command = re.search(rf"\b({'|'.join(COMMANDS)})\b", f"{self.prog} {message}")
        known = _parser_of(command[1]).known if command else ()
        said = in_options(message, COMMANDS[command[1]][0] if command else None, known)
        unknown = re.search(
            r"unrecognized arguments: (\S+)|does not accept option '([^']+)'|Key '([^']+)'|"
            r'Parser key "([^"]+)":\s+Unable to load config',
            message,
        )
        words = [word.lstrip("-").split("=")[0] for word in unknown.groups() if word] if unknown else []
        name = f"tvkd {command[1]}" if command else "tvkd"
        more = hint(words[0], known) if words else ""
        said = f"{said.rstrip('.')}.{more}" if more else said
        print(f"{name}: error: {said}\nAll options: {name} --help", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Errors that a user can mend are one line and exit status 2."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or not (given[0].startswith("-") or given[0] in _NAMES):
        _which_command(given)
    if given[:1] == ["bench"]:
        bench(given[1:])
        return
    if given[0] in WITHOUT_OPTIONS:
        _be_quiet()
        with _errors_in_a_line(given[0]):
            WITHOUT_OPTIONS[given[0]](given[1:])
        return
    arguments = _expand(given)
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    _be_quiet()
    try:
        with _errors_in_a_line(parsed.command), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            fields = _fields(parser.instantiate(parsed)[parsed.command])
            if fields.get("nproc", 1) > 1 and "WORLD_SIZE" not in os.environ and not fields.get("dry_run"):
                _open_outputs(parsed.command, fields)
                raise SystemExit(launch([sys.executable, "-m", "tvkd_fast", *given], fields["nproc"]))
            run(parsed.command, fields)
    except Stopped as stopped:
        if _speaks():
            print(f"tvkd {parsed.command}: {stopped}", file=sys.stderr)
        raise SystemExit(stopped.status) from stopped


def _open_outputs(command: str, fields: dict[str, Any]) -> None:
    """Once, before several processes are started that would all find what is wrong."""
    from tvkd_fast.training import build, side_by_side
    from tvkd_fast.training.refusals import check_device, check_run

    if command == "train":
        check_run(TrainConfig(**fields))
        build.open_outputs(TrainConfig(**fields))
        return
    if command == "score":
        check_score_folder(Path(ScoreConfig(**fields).output_dir))
    elif command == "eval":
        side_by_side.open_outputs(EvalConfig(**fields))
    check_device(fields["model"])
    check_replicas(fields["parallel"].replicas, fields["nproc"])


@contextmanager
def _errors_in_a_line(command: str) -> Iterator[None]:
    """What a user can mend is told in a line; what is wrong with a file or folder is among it."""
    try:
        yield
    except OSError as error:
        print(f"tvkd {command}: error: {in_a_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    except (ValueError, FloatingPointError, CheckpointError) as error:
        print(f"tvkd {command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def run(command: str, fields: dict[str, Any]) -> None:
    """One command with its fields already typed."""
    from tvkd_fast.training import build, explain, plan, road

    if command == "demo" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("tvkd demo is one process's: start it without torchrun")
    if command == "demo":
        demo = DemoConfig(**fields)
        road.walk(demo, load_recipe(demo.recipe))
    elif command == "score":
        config = ScoreConfig(**fields)
        manifest = build.score(config).manifest
        if _speaks():
            print(
                f"scored {manifest.pairs:,} pairs ({manifest.states:,} states, kappa {manifest.kappa}): "
                f"{config.output_dir}"
            )
            if config.teacher is None:
                print("no --teacher was given: this is the reference alone, for --objective dpo")
    elif command == "explain":
        print("\n".join(map(str, explain.explain(ExplainConfig(**fields)))))
    elif command == "eval":
        _evaluate(EvalConfig(**fields))
    else:
        train = TrainConfig(**fields)
        if train.dry_run:
            if _speaks():
                print(plan.plan(train))
            return
        figures = build.train(train)
        if not _speaks():
            return
        print(f"final model: {Path(train.output_dir) / build.FINAL}")
        best = build.best_checkpoint(train)
        if best is not None:
            print(f"best by {train.keep_best}: {best}; a model of it: tvkd export {best}")
        elif train.keep_best != "none":
            print(f"best by {train.keep_best}: none, since no checkpoint on disk has a finite {train.keep_best}")
        if figures is not None:
            print(json.dumps(figures.known()))


def _evaluate(config: EvalConfig) -> None:
    from tvkd_fast.training import build, judged, side_by_side

    if _speaks():
        side_by_side.open_outputs(config)
    side_by_side.check_can_answer(config)
    if config.tabled:
        found = side_by_side.compare_models(config)
        if _speaks():
            print(judged.table(found) + "\n")
    else:
        found = build.evaluate_policy(config).known()
    if not _speaks():
        return
    line = json.dumps({"policy": config.policy, **found})
    print(line)
    if config.output is not None:
        with written(Path(config.output)), Path(config.output).open("a") as file:
            file.write(line + "\n")
    if config.generate is not None:
        print("\n".join(map(str, side_by_side.write_answers(config))))


def _which_command(given: list[str]) -> NoReturn:
    """No command, or none that there is."""
    if not given:
        make_parser().print_help(sys.stderr)
        raise SystemExit(2)
    close = difflib.get_close_matches(given[0], _NAMES, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    print(
        f"tvkd: error: there is no command {given[0]!r}.{hint} There are {', '.join(_NAMES)}: tvkd --help",
        file=sys.stderr,
    )
    raise SystemExit(2)


def _speaks() -> bool:
    """Whether this process is the one, of however many torchrun started, that speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


def scores(arguments: list[str]) -> None:
    """`tvkd scores FOLDER` prints what is in a score cache, and holds every byte of it to its checksums."""
    _usage(arguments, "tvkd scores FOLDER: what is in a folder that `tvkd score` wrote", most=1)
    print(describe(arguments[0]))


def replay(arguments: list[str]) -> None:
    """`tvkd replay FILE`: the pairs of a step that was not finite, one by one."""
    from tvkd_fast.training import build
    from tvkd_fast.training.replay import told

    _usage(arguments, "tvkd replay OUTPUT_DIR/nonfinite-step-NNNNNN.json: the step's pairs, one by one", most=1)
    print(told(build.replay(arguments[0])))


def plot(arguments: list[str]) -> None:
    """`tvkd plot RUN ...` draws the curves of runs over each other."""
    from tvkd_fast.training.plot import plot_runs

    _usage(arguments, "tvkd plot OUTPUT_DIR [OUTPUT_DIR ...]: draws their curves as curves.png in the first")
    print(plot_runs([Path(folder).expanduser() for folder in arguments]))


def export(arguments: list[str]) -> None:
    """`tvkd export CHECKPOINT [FOLDER]`: a model of a run's checkpoint, that `from_pretrained` loads."""
    from tvkd_fast.training.export import export as export_checkpoint

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


def _usage(arguments: list[str], usage: str, *, most: int = 10**6) -> None:
    if 1 <= len(arguments) <= most and not any(argument.startswith("-") for argument in arguments):
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


def bench(arguments: list[str]) -> None:
    """`tvkd bench NAME ...` runs a benchmark of the checkout that this package lies in."""
    root = Path(__file__).resolve().parents[1]
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


def make_parser() -> Parser:
    """The parser of all commands."""
    # The help texts are the docstrings under the configs' fields.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="tvkd",
        description="Preference distillation (TVKD) at the cost of fine-tuning.",
        epilog="tvkd scores FOLDER prints what is in a folder that score wrote, tvkd plot RUN ... draws the curves of "
        "runs, tvkd replay FILE goes through the pairs of a step that was not finite, and tvkd export CHECKPOINT makes "
        "a model of a run's checkpoint. In a checkout, tvkd bench head, values or step times the head beside its peers "
        "(each has --help).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subcommands(dest="command")
    for name, (_, summary) in COMMANDS.items():
        sub = _parser_of(name)
        commands.add_subcommand(name, sub, help=summary)
    return parser


def _parser_of(name: str) -> Parser:
    """The parser of one command's options."""
    config, summary = COMMANDS[name]
    parser = Parser(
        prog=f"tvkd {name}",
        usage=f"tvkd {name} [--config FILE_OR_RECIPE] [options]",
        description=f"{summary[0].upper()}{summary[1:]}.",
        allow_abbrev=False,
    )
    if name != "demo":
        parser.add_argument(
            "--config", action="config", help=f"YAML of the options below, or a recipe: {', '.join(recipes())}"
        )
    parser.add_class_arguments(config)
    parser.known = tuple(action.dest for action in parser._actions)
    return parser


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("tvkd_fast").joinpath("recipes").iterdir()
        if p.name.endswith(".yaml")
    )


def load_recipe(name: str) -> TrainConfig:
    """A training recipe by the name of one that comes with the package, or by file."""
    parser = _parser_of("train")
    parsed = parser.instantiate(parser.parse_args(["--config", str(_recipe_path(name))]))
    return TrainConfig(**_fields(parsed))


def _fields(parsed: Any) -> dict[str, Any]:
    """A command's fields, typed, without the file that they may have come from."""
    return {name: value for name, value in vars(parsed).items() if name != "config"}


def _recipe_path(name: str) -> Path:
    name = os.path.expanduser(name)
    packaged = Path(str(resources.files("tvkd_fast").joinpath("recipes", f"{name}.yaml")))
    if not Path(name).exists() and packaged.exists():
        return packaged
    if not Path(name).exists():
        print(f"tvkd: error: no recipe or file {name!r}; recipes: {', '.join(recipes())}", file=sys.stderr)
        raise SystemExit(2)
    return Path(name)


def _renamed(arguments: list[str]) -> list[str]:
    """Of eval: `--model` is the policy, and each further one is compared with it; `--data FILE` the held-out pairs."""
    renamed, models = [arguments[0]], sum(a.partition("=")[0] == "--policy" for a in arguments)
    for argument in arguments[1:]:
        name, equals, value = argument.partition("=")
        if name == "--model":
            name = "--compare+" if models else "--policy"
            models += 1
        elif name == "--data":
            name = "--data.eval"
        renamed.append(name + equals + value)
    return renamed


def _expand(arguments: list[str]) -> list[str]:
    """Bare switches get their value, and names of recipes their path."""
    if arguments[:1] == ["eval"]:
        arguments = _renamed(arguments)
    expanded: list[str] = []
    for i, argument in enumerate(arguments):
        expanded.append(argument)
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if argument in _SWITCHES and following.startswith("--"):
            expanded.append("true")
        if i > 0 and arguments[i - 1] == "--config":
            expanded[-1] = str(_recipe_path(argument))
        elif argument.startswith("--config="):
            expanded[-1] = f"--config={_recipe_path(argument.removeprefix('--config='))}"
    return expanded


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """What is said to a user, in a line; where in the code it was said is nothing to them."""
    if issubclass(category, UserWarning):
        print(f"\ntvkd: warning: {message}", file=sys.stderr)


def _be_quiet() -> None:
    """Loading bars and notices of the libraries beneath would drown the run's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
