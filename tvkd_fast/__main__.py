"""`python -m tvkd_fast` is `tvkd`."""

from tvkd_fast.cli.main import main

main()
