"""The number of examples that hypothesis draws: few in the first tier, all of them in the tiers that CI adds."""

import os
from typing import Any

from hypothesis import settings

THOROUGH = os.environ.get("TVKD_DRAWS", "few") == "all"
FEW = 6
"""The divisor of a test's examples in the first tier, which draws at least `LEAST` and at most `MOST`."""
LEAST, MOST = 5, 25


def draws(examples: int = 100, *, fresh: bool = False, **options: Any) -> settings:
    """The settings of a test that draws so many examples: the same ones at every run, or with `fresh`, and where all
    are drawn, others each time."""
    number = examples if THOROUGH else min(examples, MOST, max(LEAST, examples // FEW))
    return settings(deadline=None, derandomize=not (fresh and THOROUGH), max_examples=number, **options)
