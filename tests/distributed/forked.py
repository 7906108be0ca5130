"""The entry point of a process of `launch`."""

import os
import runpy
import sys
import warnings


def begin(environment: dict[str, str], command: list[str], output: str) -> None:
    """Takes a place in the world and runs a script there, as torchrun would; what it prints goes to a file."""
    os.environ.update(environment)
    with open(output, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    warnings.simplefilter("ignore")
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
