"""The commands, from config to result: one file per command, and the code that they share."""
