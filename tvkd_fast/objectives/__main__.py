"""`python -m tvkd_fast.objectives` prints the table of all objectives."""

from tvkd_fast.objectives.catalogue import table

print(table())
