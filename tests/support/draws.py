"""How many examples hypothesis draws: few where every change is tested, all of them in the tiers that CI adds."""

import os
from typing import Any

from hypothesis import settings

THOROUGH = os.environ.get("TVKD_DRAWS", "few") == "all"
FEW = 6
"""In the first tier a test draws one in so many of its examples, but no fewer than `LEAST` and no more than `MOST`."""
LEAST, MOST = 5, 25


def draws(examples: int = 100, *, fresh: bool = False, **options: Any) -> settings:
    """The settings of a test that draws so many examples: the same ones at every run, or with `fresh`, and where all
    are drawn, others each time."""
    number = examples if THOROUGH else min(examples, MOST, max(LEAST, examples // FEW))
    return settings(deadline=None, derandomize=not (fresh and THOROUGH), max_examples=number, **options)
