"""`tvkd score | train | sample | eval | …`: a config is a command's options, a recipe a YAML of them."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

from tvkd_fast.cli.mixtures import with_parts
from tvkd_fast.cli.parser import (
    COMMANDS,
    expand,
    fields_of,
    for_objective,
    load_recipe,
    make_parser,
    objective_of,
)
from tvkd_fast.cli.positional import WITHOUT_OPTIONS, bench
from tvkd_fast.commands.demo import DemoConfig
from tvkd_fast.distributed import is_main_process, launch, print_once
from tvkd_fast.files import in_a_line
from tvkd_fast.training.checkpoint import CheckpointError
from tvkd_fast.training.signals import Stopped

_NAMES = (*COMMANDS, "scores", "replay", "plot", "bench", "export")


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
        with _errors_in_a_line(given[0]), _warnings_in_a_line():
            WITHOUT_OPTIONS[given[0]](given[1:])
        return
    with _errors_in_a_line(given[0]):
        arguments = with_parts(expand(given))
    objective = objective_of(arguments)
    parser = make_parser(objective)
    parsed = parser.parse_args(for_objective(arguments, objective))
    _be_quiet()
    try:
        with _errors_in_a_line(parsed.command), _warnings_in_a_line():
            fields = fields_of(parser.instantiate(parsed)[parsed.command])
            if fields.get("nproc", 1) > 1 and "WORLD_SIZE" not in os.environ and not fields.get("dry_run"):
                _check(parsed.command, fields)
                raise SystemExit(launch([sys.executable, "-m", "tvkd_fast", *given], fields["nproc"]))
            run(parsed.command, fields)
    except Stopped as stopped:
        if is_main_process():
            print(f"tvkd {parsed.command}: {stopped}", file=sys.stderr)
        raise SystemExit(stopped.status) from stopped


def run(command: str, fields: dict[str, Any]) -> None:
    """Run one command, whose fields are typed already."""
    module, config = import_module(f"tvkd_fast.commands.{command}"), COMMANDS[command][0](**fields)
    if isinstance(config, DemoConfig):
        module.run(config, load_recipe(config.recipe))
    else:
        module.run(config)


def _check(command: str, fields: dict[str, Any]) -> None:
    """Make the command's checks once, before several processes are started."""
    import_module(f"tvkd_fast.commands.{command}").check(COMMANDS[command][0](**fields))


@contextmanager
def _errors_in_a_line(command: str) -> Iterator[None]:
    """Print an error that a user can mend, that of a file or folder among them, as one line; exit with status 2."""
    try:
        yield
    except OSError as error:
        print_once(f"tvkd {command}: error: {in_a_line(error)}")
        raise SystemExit(2) from error
    except (ValueError, FloatingPointError, CheckpointError) as error:
        print_once(f"tvkd {command}: error: {error}")
        raise SystemExit(2) from error


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print warnings to a user as one line, and leave out those that libraries have for programmers."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


def _which_command(given: list[str]) -> NoReturn:
    """Exit with a message for a missing or an unknown command."""
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


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print a warning to the user without its place in the code."""
    if issubclass(category, UserWarning):
        print(f"\ntvkd: warning: {message}", file=sys.stderr)


def _be_quiet() -> None:
    """Silence the loading bars and notices of libraries, which would drown the run's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
