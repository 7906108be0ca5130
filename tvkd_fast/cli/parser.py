"""The parser of all commands: a config is a command's options, a recipe a YAML of them."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from tvkd_fast.cli.mixtures import with_parts
from tvkd_fast.cli.options import hint, in_options
from tvkd_fast.commands.demo import DemoConfig
from tvkd_fast.commands.eval import EvalConfig
from tvkd_fast.commands.explain import ExplainConfig
from tvkd_fast.commands.sample import SampleConfig
from tvkd_fast.commands.score import ScoreConfig
from tvkd_fast.distributed import print_once
from tvkd_fast.objectives import DEFAULT, Objective, objective_named, objectives, settings_names
from tvkd_fast.training.train_config import TrainConfig
from tvkd_fast.version import __version__

COMMANDS: dict[str, tuple[type, str]] = {
    "score": (ScoreConfig, "run teacher and reference once over the data and keep what they say of it on disk"),
    "train": (TrainConfig, "train a policy by an objective"),
    "sample": (SampleConfig, "sample responses, or pairs of them, from a model: data for train and score"),
    "eval": (EvalConfig, "evaluate a policy, or several (--model A --model B), on preference pairs (--data PAIRS)"),
    "explain": (ExplainConfig, "draw what a teacher's value does, token by token, over the two responses of a pair"),
    "demo": (DemoConfig, "the whole method on this machine: teacher, student, scores, TVKD and DPO, table, picture"),
}

PROGRAM = __name__.partition("_")[0]
"""The command has the package's name up to its underscore."""

ONLY_HELD_OUT = ("eval", "explain")
"""Commands that read data.eval and no data.train."""

_SWITCHES = ("--dry_run", "--quick")


class Parser(ArgumentParser):
    """An argument parser with short errors that suggest what to type instead."""

    known: tuple[str, ...] = ()
    """Options of the command; of the outer parser none."""
    objective: str = DEFAULT
    """The objective whose settings are the options under --loss."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # An error in a YAML file reaches the outer parser, which names the command in the message.
        command = re.search(rf"\b({'|'.join(COMMANDS)})\b", f"{self.prog} {message}")
        known = self.known or (parser_of(command[1]).known if command else ())
        refusal = in_options(message, COMMANDS[command[1]][0] if command else None, known)
        unknown = re.search(
            r"unrecognized arguments: (\S+)|does not accept option '([^']+)'|Key '([^']+)'|"
            r'Parser key "([^"]+)":\s+Unable to load config',
            message,
        )
        words = [word.lstrip("-").split("=")[0] for word in unknown.groups() if word] if unknown else []
        name = f"{PROGRAM} {command[1]}" if command else PROGRAM
        if command and command[1] in ONLY_HELD_OUT:
            known = tuple(option for option in known if not option.startswith("data.train"))
        more = (self._of_another_objective(words[0]) or hint(words[0], known)) if words else ""
        refusal = f"{refusal.rstrip('.')}.{more}" if more else refusal
        print_once(f"{name}: error: {refusal}\nAll options: {name} --help")
        raise SystemExit(2)

    def _of_another_objective(self, option: str) -> str:
        """A sentence where the option is a setting of objectives other than the one that was asked for."""
        group, _, name = option.rpartition(".")
        owners = [other for other, cls in objectives().items() if group == "loss" and name in settings_names(cls)]
        if not owners or self.objective in owners:
            return ""
        own = [f"--loss.{setting}" for setting in settings_names(objective_named(self.objective))]
        has = f"has {', '.join(own)}" if own else "has none"
        return f" It is a setting of {' and '.join(owners)}, and {self.objective} {has}."


def make_parser(objective: str = DEFAULT) -> Parser:
    """The parser of all commands, with the settings of one objective."""
    # The help texts are the docstrings under the configs' fields.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog=PROGRAM,
        description="Preference distillation (TVKD) at the cost of fine-tuning.",
        epilog="tvkd scores FOLDER prints what is in a folder that score wrote, tvkd plot RUN ... draws the curves of "
        "runs, tvkd replay FILE goes through the pairs of a step that was not finite, and tvkd export CHECKPOINT makes "
        "a model of a run's checkpoint. In a checkout, tvkd bench head, values, step, divergence or rollout times "
        "each beside its peers (--help says how).",
        allow_abbrev=False,
    )
    parser.objective = objective
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subcommands(dest="command")
    for name, (_, summary) in COMMANDS.items():
        sub = parser_of(name, objective)
        commands.add_subcommand(name, sub, help=summary)
    return parser


def parser_of(name: str, objective: str = DEFAULT) -> Parser:
    """The parser of one command's options; those under --loss are the settings of the objective."""
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
    if get_type_hints(config).get("loss") is Objective:
        parser.add_class_arguments(config, skip={"loss"})
        parser.add_class_arguments(objective_named(objective), "loss")
        (choice,) = (action for action in parser._actions if action.dest == "objective")
        choice.help = f"{choice.help} One of {', '.join(objectives())}; shown here: {objective}"
    else:
        parser.add_class_arguments(config)
    parser.objective = objective
    # An objective's settings are what is meant before those of other groups: --alpha is its alpha before the adapters'.
    options = [action.dest for action in parser._actions]
    parser.known = tuple(sorted(options, key=lambda option: not option.startswith("loss.")))
    return parser


def objective_of(arguments: Sequence[str]) -> str:
    """The objective that the arguments name, or the last of their YAML files that names one."""
    named = [*_values_of("--objective", arguments)]
    for file in _values_of("--config", arguments) if not named else ():
        found = _mapping(file)
        if "objective" in found:
            named = [str(found["objective"])]
    name = named[-1] if named else DEFAULT
    if name in objectives():
        return name
    close = difflib.get_close_matches(name, objectives(), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    command = arguments[0] if arguments and arguments[0] in COMMANDS else "train"
    print(
        f"tvkd {command}: error: --objective wants one of {', '.join(objectives())}, and got {name!r}.{hint}\n"
        f"All options: tvkd {command} --help",
        file=sys.stderr,
    )
    raise SystemExit(2)


def for_objective(arguments: Sequence[str], objective: str) -> list[str]:
    """The arguments with files of another objective's settings reduced to those that this one has too."""
    return [
        _reduced(argument, objective) if i > 0 and arguments[i - 1] == "--config" else argument
        for i, argument in enumerate(arguments)
    ]


def _reduced(file: str, objective: str) -> str:
    """The file, or its text without the settings of another objective."""
    found = _mapping(file)
    if not isinstance(found.get("loss"), dict):
        return file
    theirs = str(found.get("objective", DEFAULT))
    if theirs == objective or theirs not in objectives():
        return file
    own, others = settings_names(objective_named(objective)), settings_names(objective_named(theirs))
    left_out = [name for name in found["loss"] if name in others and name not in own]
    if not left_out:
        return file
    print_once(f"{file} has settings of {theirs} that {objective} has not; left out: {', '.join(left_out)}")
    kept = {name: value for name, value in found["loss"].items() if name not in left_out}
    return yaml.safe_dump(found | {"objective": objective, "loss": kept}, allow_unicode=True)


def _mapping(file: str) -> dict[str, Any]:
    """What a YAML file has, or a text in its place; nothing where it cannot be read, which the parser reports."""
    try:
        found = yaml.safe_load(file if "\n" in file else Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _values_of(option: str, arguments: Sequence[str]) -> Iterator[str]:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == option and following:
            yield following
        elif argument.startswith(f"{option}="):
            yield argument.partition("=")[2]


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(_packaged_recipes())


def _packaged_recipes() -> dict[str, Path]:
    """The recipes that come with the package, in whichever of its folders."""
    folder = Path(str(resources.files("tvkd_fast").joinpath("recipes")))
    return {file.stem: file for file in folder.rglob("*.yaml")}


def load_recipe(name: str) -> TrainConfig:
    """A training recipe by the name of one that comes with the package, or by file."""
    arguments = with_parts(["--config", str(_recipe_path(name))])
    parser = parser_of("train", objective_of(arguments))
    parsed = parser.instantiate(parser.parse_args(arguments))
    return TrainConfig(**fields_of(parsed))


def fields_of(parsed: Any) -> dict[str, Any]:
    """Return a command's typed fields, without the path of the recipe."""
    return {name: value for name, value in vars(parsed).items() if name != "config"}


def _recipe_path(name: str) -> Path:
    name = os.path.expanduser(name)
    packaged = _packaged_recipes().get(name)
    if not Path(name).exists() and packaged is not None:
        return packaged
    if not Path(name).exists():
        print_once(f"tvkd: error: no recipe or file {name!r}; recipes: {', '.join(recipes())}")
        raise SystemExit(2)
    if Path(name).is_dir():
        print_once(f"tvkd: error: --config {name} is a folder: give a YAML file, or a recipe's name")
        raise SystemExit(2)
    return Path(name)


def _renamed(arguments: list[str]) -> list[str]:
    """Rename eval's short options: the first `--model` is the policy, each further one is compared with it, and
    `--data FILE` is the held-out pairs."""
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


def expand(arguments: list[str]) -> list[str]:
    """Add the value of bare switches, and replace names of recipes by their paths."""
    if arguments[:1] == ["eval"]:
        arguments = _renamed(arguments)
    if arguments[:1] == ["sample"]:
        # It reads one set of prompts, and has no other.
        arguments = [re.sub(r"^--data(?==|$)", "--data.train", argument) for argument in arguments]
    # λ is spelt with the underscore that keeps Python's keyword apart.
    arguments = [re.sub(r"^--loss\.lambda(?==|$)", "--loss.lambda_", argument) for argument in arguments]
    expanded: list[str] = []
    for i, argument in enumerate(arguments):
        expanded.append(argument)
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if argument in _SWITCHES and following.startswith("--"):
            expanded.append("true")
        if i > 0 and arguments[i - 1] == "--config":
            expanded[-1] = str(_recipe_path(argument))
        elif argument.startswith("--config="):
            expanded[-1:] = ["--config", str(_recipe_path(argument.removeprefix("--config=")))]
    return expanded
