"""What a run would take, counted from shapes and data: `tvkd train --dry_run`."""
