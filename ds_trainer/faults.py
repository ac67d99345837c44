"""Places where a test makes a run fail, or holds it up, so that what follows can be proved. A real run never does.

`DS_TRAINER_FAULT="saving:1:4=kill"` kills rank 1 where it saves step 4. Several are joined by commas; rank and step may be left
out (`saving=stop`, `saving::4=stop`) and then mean any. What a point did is said on standard error, before it is done.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from ds_trainer.errors import RefusedError

VARIABLE = "DS_TRAINER_FAULT"
ACTIONS = ("kill", "stop", "raise", "enospc", "memory", "sleep", "freeze", "exit")
"""SIGKILL, SIGSTOP, a ValueError, a full disk, memory that runs out, `sleep=SECONDS`, an endless loop in C that keeps the
interpreter's lock, `exit=CODE`.
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to happen at a point."""

    rank: int | None
    step: int | None
    action: str
    amount: float = 0.0
    """Seconds of `sleep`, the code of `exit`."""


def faults_of(text: str) -> dict[str, list[Fault]]:
    """Read the variable's text: what is to happen, by the name of the point.

    Raises:
        RefusedError: it is not `name[:rank[:step]]=action`.
    """
    found: dict[str, list[Fault]] = {}
    for each in filter(None, text.split(",")):
        where, _, what = each.partition("=")
        name, *numbers = where.split(":")
        action, _, amount = what.partition("=")
        try:
            rank, step = (int(number) if number else None for number in [*numbers, "", ""][:2])
            fault = Fault(rank, step, action, float(amount) if amount else 0.0)
        except ValueError:
            fault = None
        if fault is None or not name or len(numbers) > 2 or action not in ACTIONS:
            raise RefusedError(
                f"{VARIABLE}: {each!r} is not name[:rank[:step]]=action with one of the actions {', '.join(ACTIONS)}. "
                f"Write for example {VARIABLE}=saving:1:4=kill, or unset it: it is for tests."
            )
        found.setdefault(name, []).append(fault)
    return found


def ours(environ: Mapping[str, str]) -> dict[str, list[Fault]]:
    """What is to happen in this process, whose rank the environment tells."""
    rank = int(environ.get("RANK", "0"))
    every = faults_of(environ.get(VARIABLE, ""))
    return {name: mine for name, faults in every.items() if (mine := [each for each in faults if each.rank in (None, rank)])}


_faults: dict[str, list[Fault]] | None = ours(os.environ) if VARIABLE in os.environ else None
_step: int | None = None


def at_step(step: int) -> None:
    """From now on points belong to this step: the one that is being worked on, from 1."""
    global _step
    _step = step


def point(name: str) -> None:
    """A place of this name; nothing happens here unless a test asked for it.

    Raises:
        ValueError: a test asked for `raise`.
        OSError: a test asked for a full disk.
        MemoryError: a test asked for more memory than there is.
    """
    if _faults is None:
        return
    for fault in _faults.get(name, ()):
        if fault.step in (None, _step):
            os.write(2, f"fault: {name} at step {_step}: {fault.action} {fault.amount:g}\n".encode())
            _act(fault, name)


def _act(fault: Fault, name: str) -> None:
    if fault.action == "sleep":
        time.sleep(fault.amount)
    elif fault.action == "freeze":
        deque(itertools.repeat(None), maxlen=0)
    elif fault.action == "exit":
        os._exit(int(fault.amount))
    elif fault.action == "raise":
        raise ValueError(f"a test asked for this failure at {name}")
    elif fault.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    elif fault.action == "memory":
        bytearray(2**60)
    else:
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)
