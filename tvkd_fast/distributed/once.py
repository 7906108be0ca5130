"""Messages that every process would print, printed once."""

from __future__ import annotations

import hashlib
import os
import sys
from datetime import timedelta

from torch.distributed import TCPStore

KEY = "tvkd_fast/printed/{}"
STORE_TIMEOUT = timedelta(seconds=5)
"""The time limit for reaching the store in which the processes meet."""


def print_once(text: str) -> None:
    """Print to stderr what no other process has printed: a refusal is each one's, and one of them is enough.

    Which process comes first is left to the store in which they meet, since only some of them may have anything to
    print. Where it cannot be reached, each of them prints.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _is_first(text):
        print(text, file=sys.stderr)


def _is_first(text: str) -> bool:
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
        return bool(store.add(KEY.format(hashlib.sha256(text.encode()).hexdigest()), 1) == 1)
    except (KeyError, ValueError, OSError, RuntimeError):
        return True


def is_main_process() -> bool:
    """Return whether this process is the first of those that were started, the one that prints results."""
    return os.environ.get("RANK", "0") == "0"
