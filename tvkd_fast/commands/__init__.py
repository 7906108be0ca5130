"""What each command does, from its config to done: one file per command, and what they share."""
