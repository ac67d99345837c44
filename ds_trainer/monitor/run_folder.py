"""The run folder: what was asked, what is in force, what happened, how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ds_trainer import __version__, whereabouts
from ds_trainer.errors import CheckpointError, HangError, RefusedError


class RunFolder:
    """Paths and small files of one run. Only rank zero writes, except logs and errors, which have one file a rank."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self.rank = rank

    @property
    def checkpoints(self) -> Path:
        """Complete checkpoints, and `latest`."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON line a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What this rank and its libraries print."""
        return self.path / "logs" / f"rank_{self.rank:05d}.log"

    @property
    def error(self) -> Path:
        """The traceback of this rank, when it failed."""
        return self.path / "errors" / f"rank_{self.rank:05d}.txt"

    @property
    def first_failure(self) -> Path:
        """Names the rank that failed first; it is there as soon as one has."""
        return self.path / "errors" / "first_failure.txt"

    def create(self) -> None:
        """Make the folder and prove that it can be written. Every rank.

        Raises:
            RefusedError: it cannot.
        """
        try:
            for folder in (self.path, self.log.parent, self.path / "errors"):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{socket.gethostname()}-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RefusedError(
                f"checkpoint.folder = {self.path}: cannot be written ({error.strerror}: {error.filename}). "
                "Set checkpoint.folder to a folder you can write to."
            ) from None

    def lock(self) -> None:
        """Keep any other start out of the folder for as long as this process lives; rank zero's business.

        The kernel releases the lock with its owner, so a killed run leaves none behind.

        Raises:
            RefusedError: another start is at work here, with its host, process and time.
        """
        self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            raise RefusedError(
                f"checkpoint.folder = {self.path}: another start is training in it ({self._lock.read().strip()}). "
                "Wait for it, end it, or write another folder, for example checkpoint.folder=" + f"{self.path}-2."
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
        self._lock.flush()

    def write_json(self, name: str, fields: Any) -> None:
        """Write a JSON file whole or not at all. Rank zero's business.

        Raises:
            CheckpointError: the disk is full or the folder is gone.
        """
        target, temporary = self.path / name, self.path / f".{name}"
        try:
            temporary.write_text(json.dumps(fields, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            raise CheckpointError(f"{target} could not be written ({error.strerror}).") from None

    def event(self, kind: str, **fields: Any) -> None:
        """Append a line to events.jsonl."""
        self._append("events.jsonl", {"time": now(), "event": kind, **fields})

    def has_saved(self) -> bool:
        """Whether this run has completed a checkpoint since it last started from nothing, by its own account."""
        saved = False
        with contextlib.suppress(FileNotFoundError), (self.path / "events.jsonl").open(encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError):  # a line that a kill cut short
                    kind = json.loads(line)["event"]
                    saved = kind == "saved" or (saved and kind != "started_anew")
        return saved

    def metric(self, fields: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self._append(self.metrics.name, fields)

    def _append(self, name: str, fields: dict[str, Any]) -> None:
        # JSON has no word for what is not finite.
        fields = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in fields.items()
        }
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.path / name} could not be written ({error.strerror}).") from None

    def forget_last_end(self) -> None:
        """Forget how an earlier start ended, its errors and exit code. Rank zero's business, before the ranks meet.

        A start that is then killed leaves no exit.json, so that nobody takes the code of an earlier one for its own.
        """
        for path in (*(self.path / "errors").glob("*.txt"), self.path / "exit.json"):
            path.unlink(missing_ok=True)

    def record_error(self, error: BaseException) -> bool:
        """Write this rank's traceback; any rank may call it alone.

        Returns:
            Whether this rank is the first to fail: the others most likely fail because of it.
        """
        folder = self.path / "errors"
        text = "".join(traceback.format_exception(error))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not isinstance(error, HangError):  # the watchdog has written down there where this rank stands
                with self.error.open("a", encoding="utf-8") as file:
                    file.write(f"{now()} on {socket.gethostname()}\n{text}")
                    file.flush()
                    if error.__traceback__ is None:  # a signal: then where every thread was, for a run that hung
                        faulthandler.dump_traceback(file)
            # Only one rank can create it: the file system decides who was first.
            with self.first_failure.open("x", encoding="utf-8") as marker:
                marker.write(f"{self.error.name}\n")
            return True
        except FileExistsError:
            return False
        except OSError:
            return True  # the disk is full, say: then rather twice on the terminal than never

    def finish(self, code: int, reason: str, *, step: int | None, command: str | None) -> None:
        """Say in exit.json how this start ended, since torchrun answers 1 whatever its workers said.

        Args:
            code: the exit code.
            reason: in words.
            step: of the newest checkpoint; None when there is none.
            command: what continues the run from there; None when something has to be mended first.
        """
        # Who tells it, and on which step that rank worked: what `debug --replay` goes by.
        fields = {"code": code, "reason": reason, "step": step, "rank": self.rank, "at_step": whereabouts.now.step}
        with contextlib.suppress(CheckpointError):  # the disk is full; the reason is on the terminal
            self.write_json("exit.json", {"time": now(), **fields, "continue": command})
            self.event("ended", **fields)


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(extra: dict[str, Any]) -> dict[str, Any]:
    """Versions, host and devices of this start."""
    from importlib.metadata import version
    from importlib.util import find_spec

    import torch

    packages = ["torch", "deepspeed", "transformers", "peft", "tokenizers", "safetensors", "numpy"]
    if find_spec("bitsandbytes"):
        packages.append("bitsandbytes")
    cuda = torch.cuda.is_available()
    return {
        "time": now(),
        "ds_trainer": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda,
        "argv": sys.argv,
        "folder": os.getcwd(),
        **extra,
    }


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def peak_memory_gib(device_type: str) -> float:
    """The most this process has held: allocated memory of its GPU, or resident memory on a CPU, in GiB."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    # Not ru_maxrss, which begins with the resident memory of the launcher.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 2**30


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        previous, self._last = self._last, time.monotonic()
        return self._last - previous
