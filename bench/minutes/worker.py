"""A process that runs the cases of one step as it is asked for them, and answers in lines of JSON.

    python -m bench.minutes.worker MODULE [--dry]

It first sends {"cases": [[name, seconds, whether it is a peer's], …]}. For each {"case": name} that it reads it sends
{"row": …} once or more and then {"done": name}. A case that left the device unusable is followed by {"leaving": name}
and the end of the process: another one goes on.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from bench.harness.contenders import reason
from bench.minutes.cases import Case, NotTriedError, Row, Scale


def rows_of(case: Case) -> Iterator[Row]:
    """The case's rows as they come; what it raises is a row."""
    try:
        found = case.run()
        synchronize()
        for row in [found] if isinstance(found, dict) else found:
            synchronize()
            yield {"name": case.name} | row
    except NotTriedError as why:
        yield {"name": case.name, "skipped": str(why)}
    except ModuleNotFoundError as missing:
        # Ours is here; a peer may not be.
        yield {"name": case.name, "skipped" if case.peer else "failed": reason(missing)}
    except Exception as error:
        yield {"name": case.name, "failed": reason(error)}


def synchronize() -> None:
    """Wait for the device, so that a kernel's crash is raised in the case that launched it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def is_usable() -> bool:
    """Return whether the device still answers; after an illegal address no call of the process succeeds."""
    try:
        synchronize()
    except RuntimeError:
        return False
    return True


def clear() -> None:
    """Leave the next case the memory that this one had."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main() -> None:
    # What kernels, compilers and libraries print goes to the log; answers have a place of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    faulthandler.enable()

    def send(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    module, dry = sys.argv[1], "--dry" in sys.argv[2:]
    cases = {case.name: case for case in import_module(module).cases(Scale(dry))}
    # What was imported stays; a collection after each case need not walk it, which takes longer than many a case.
    gc.freeze()
    send(cases=[[case.name, case.limit, case.peer] for case in cases.values()])
    for line in sys.stdin:
        name = json.loads(line)["case"]
        for row in rows_of(cases[name]):
            send(row=row)
        if not is_usable():
            send(leaving=name)
            # Without the teardown, which would wait for a device that does not answer.
            os._exit(1)
        clear()
        send(done=name)


if __name__ == "__main__":
    main()
