"""The command line: parsing, and errors in a line. What a command does is in `tvkd_fast.commands`."""

from tvkd_fast.cli.main import main

__all__ = ["main"]
