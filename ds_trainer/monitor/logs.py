"""Keep the terminal for what the user must see: everything else goes to one log file a rank.

DeepSpeed, transformers, gloo and NCCL write to Python's loggers, to warnings, to `print` and from C++ straight to the file
descriptors. So the descriptors themselves are turned to the log file, and our own console keeps a copy of the old ones.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from rich.console import Console

from ds_trainer.errors import DsTrainerError


class _Lasting(io.TextIOWrapper):
    """A terminal that may go away, with its window or its connection, while the run goes on or saves."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def terminal(stream: TextIO | None = None) -> Console:
    """A console on the stream as it is now, so that it outlives `to_log_file`."""
    stream = stream or sys.stdout
    copy: IO[str] = stream
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor, as under pytest
        raw = os.fdopen(os.dup(stream.fileno()), "wb")
        copy = _Lasting(raw, encoding="utf-8", errors="replace", line_buffering=True)
    # A log file has no width: lines are not wrapped there.
    return Console(file=copy, highlight=False, soft_wrap=True)


def to_log_file(path: Path) -> None:
    """From now on, whatever this process and its libraries print goes to the file. Consoles made before are not affected."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _loggers_to(path)


def _loggers_to(path: Path) -> None:
    """Send Python's loggers and warnings to the file, each line with its time."""
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    logging.basicConfig(filename=path, level=logging.INFO, force=True, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("filelock").setLevel(logging.WARNING)


def quiet_loggers(path: Path) -> None:
    """Send loggers and warnings to the file but leave `print` and the debugger alone: for one process in an IDE."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _loggers_to(path)
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


@contextmanager
def hushed() -> Iterator[None]:
    """Swallow what libraries print; shown after all when something unexpected is raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        except DsTrainerError:
            raise
        except Exception:
            sys.stdout.flush()
            sys.stderr.flush()
            sink.seek(0)
            os.write(saved[1], sink.read())
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, copy in enumerate(saved, start=1):
                os.dup2(copy, target)
                os.close(copy)
