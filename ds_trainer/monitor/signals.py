"""End on a signal at once, also where the main thread waits inside a library and Python's own handlers do not run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

ENDING = (signal.SIGINT, signal.SIGTERM)


def on_ending_signal(act: Callable[[signal.Signals], None]) -> None:
    """From now on the first SIGINT or SIGTERM calls `act` in a thread of its own; call it from the main thread.

    Python runs a handler between two steps of the main thread, which may be waiting for a GPU or for a rank that is gone. The
    byte that the interpreter writes into a pipe for each signal comes at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for each in ENDING:
        signal.signal(each, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)  # the pipe is the parent's
    threading.Thread(target=lambda: _watch(reader, act), daemon=True, name="signals").start()


def _watch(reader: int, act: Callable[[signal.Signals], None]) -> None:
    while (number := os.read(reader, 1)[0]) not in ENDING:
        pass
    act(signal.Signals(number))


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    for each in ENDING:
        signal.signal(each, signal.SIG_DFL)
