"""The command line: parsing, and errors in a line. What a command does is in `tvkd_fast.commands`."""
