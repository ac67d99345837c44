"""Who may build something that many processes want: one of them, until it is done or dead.

The holder has a kernel lock on a file, which ends with its process. Where a shared disk keeps such locks to each host alone,
the beat that the holder writes into the file every few seconds tells the other hosts that it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ds_trainer.data.sources import Report
from ds_trainer.errors import DataError

BEAT_SECONDS = 5.0
DEAD_SECONDS = 30.0
"""A holder on another host that has not beaten for so long is dead."""
TOLD_SECONDS = 10.0
"""How often those who wait say how far the holder has come."""
_POLL_SECONDS = 0.05
_STARTED = time.time()
"""A failure written down before this process began is that of an earlier start."""


def this_host() -> str:
    """This host's name and boot, since several may be called `localhost`."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}-{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii')[:8]}"
    return socket.gethostname()


class Lease:
    """The right to build, while it is held."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._said: dict[str, Any] = {"process": os.getpid(), "host": this_host(), "beat": 0, "progress": ""}
        self._done = threading.Event()
        self._write()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._beats.start()

    def progress(self, text: str) -> None:
        """Tell those who wait how far the work is; they hear of it with the next beat."""
        self._said["progress"] = text

    def end(self, failure: str | None) -> None:
        """Say that the work is over, and why it failed if it did."""
        self._done.set()
        self._beats.join()
        self._said |= {"ended": True, "failure": failure}
        self._write()

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            self._said["beat"] += 1
            with contextlib.suppress(OSError):  # a full disk is the business of the work itself
                self._write()

    def _write(self) -> None:
        with self._lock:
            text = json.dumps(self._said).encode()
            # Blanks over what stood there before: whoever reads meanwhile must not find the file empty.
            os.pwrite(self._file.fileno(), text.ljust(os.fstat(self._file.fileno()).st_size), 0)


@contextmanager
def lease(path: Path, what: str, report: Report) -> Iterator[Lease]:
    """Hold the lease at `path` inside the context; wait for who holds it now.

    Raises:
        DataError: the process that was waited for failed; this one would fail in the same way, as late.
    """
    # Neither "w", which empties the file, nor "a", with which Linux lets `pwrite` append.
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8") as file:
        if _wait_until_free(file, path, what, report) and (failure := _read(file).get("failure")):
            raise DataError(failure)
        held = Lease(file)
        failure = None
        try:
            yield held
        except (DataError, OSError) as error:
            failure = str(error)
            raise
        finally:
            held.end(failure)


def wait_for_a_builder(path: Path, seconds: float, done: Path) -> None:
    """Return when somebody has taken the lease since this process began, when `done` exists, or when the time is up.

    The lock itself is not tried: for the moment that takes, the builder would find it held.

    Raises:
        DataError: the builder came and has already failed.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and not done.exists():
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            said = _read(file)
            if os.fstat(file.fileno()).st_mtime >= _STARTED and said:
                if failure := said.get("failure"):
                    raise DataError(failure)
                return
        time.sleep(_POLL_SECONDS)


def _wait_until_free(file: IO[str], path: Path, what: str, report: Report) -> bool:
    """Take the kernel's lock when nobody else holds the lease. Returns whether there was somebody to wait for."""
    waited, told, seen, seen_at = False, 0.0, None, time.monotonic()
    while True:
        free = _try_lock(file)
        said = _read(file)
        beat = (said.get("process"), said.get("host"), said.get("beat"))
        if beat != seen:
            seen, seen_at = beat, time.monotonic()
        over = not said or said.get("ended") or said.get("host") == this_host()
        if free and (over or time.monotonic() - seen_at > DEAD_SECONDS):
            return waited
        if free:
            fcntl.flock(file, fcntl.LOCK_UN)
        waited = True
        if time.monotonic() - told > TOLD_SECONDS:
            told = time.monotonic()
            who = f"process {said['process']} on {said['host']}" if said else "one just begun"
            progress = f", {said['progress']}" if said.get("progress") else ""
            report(f"waiting for another process that builds the {what}: {who}{progress} ({path})")
        time.sleep(_POLL_SECONDS)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: IO[str]) -> dict[str, Any]:
    """What the last holder said; empty when there is none, or when it is just writing."""
    try:
        said = json.loads(os.pread(file.fileno(), 1 << 16, 0))
    except ValueError:
        return {}
    return said if isinstance(said, dict) and {"process", "host"} <= said.keys() else {}
