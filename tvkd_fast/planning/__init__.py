"""The resources of a run, counted from shapes and data: `tvkd train --dry_run`."""
