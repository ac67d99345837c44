"""A run under a real launcher that is held up at a fault point, so that a signal finds it in a known phase."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

from helpers import clean_environment, free_port, torchrun

from ds_trainer.monitor.parents import parent_of

SECONDS = 90.0
"""For anything that is waited for, on a busy machine."""


def processes_with(mark: str) -> list[int]:
    """Processes whose environment carries the mark, but for those that only wait for their parent to take note."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def launched(launcher: str, *arguments: str, ranks: int = 2) -> list[str]:
    """The command of a launcher for `ds_trainer ARGUMENTS`."""
    if launcher == "torchrun":
        return torchrun(ranks, "-m", "ds_trainer", *arguments)
    port = str(free_port())
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", port, "--module", "ds_trainer", *arguments]


class LiveRun:
    """Owns a started command and everything it starts; a context that leaves nothing behind."""

    def __init__(self, command: list[str], *, cwd: Path, folder: Path, fault: str | None = None) -> None:
        """Take what to start.

        Args:
            command: as `launched` makes it.
            cwd: where; the terminal's text is kept there.
            folder: the run folder.
            fault: DS_TRAINER_FAULT.
        """
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self._terminal = cwd / f"terminal_{self.mark}.txt"
        extra = {"DS_TRAINER_FAULT": fault} if fault else {}
        with self._terminal.open("w") as terminal:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=clean_environment(MARK=self.mark, **extra),
                stdin=subprocess.DEVNULL,
                stdout=terminal,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *error: object) -> None:
        for process in processes_with(self.mark):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    @property
    def text(self) -> str:
        """What the terminal shows so far."""
        return self._terminal.read_text(errors="replace")

    def wait_until(self, what: Any, why: str, seconds: float = SECONDS) -> None:
        """Wait for a condition, or fail with what the terminal shows."""
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                raise AssertionError(f"{why}: not within {seconds:.0f} s\n{self.text}")
            time.sleep(0.05)

    def wait_for_fault(self, point: str) -> int:
        """Wait until a rank is held up there; gives that rank."""
        found: list[int] = []

        def reached() -> bool:
            for path in self.folder.glob("logs/rank_*.log"):
                if f"fault: {point} at" in path.read_text(errors="replace"):
                    found.append(int(path.stem.removeprefix("rank_")))
            assert found or self.process.poll() is None, self.text
            return bool(found)

        self.wait_until(reached, f"a rank at {point}")
        return found[0]

    def ranks(self) -> dict[int, int]:
        """Process of each rank: those with a RANK whose parent is a launcher."""
        launchers = {self.process.pid} | {
            each for each in processes_with(self.mark) if parent_of(each) == self.process.pid and _rank_of(each) is None
        }
        found = {_rank_of(each): each for each in processes_with(self.mark) if parent_of(each) in launchers}
        return {rank: process for rank, process in found.items() if rank is not None}

    def targets(self) -> dict[str, list[int]]:
        """Whom a signal can be sent to: rank 0, rank 1, all ranks, the launcher; with deepspeed also its launch.py."""
        ranks = self.ranks()
        found = {"rank 0": [ranks[0]], "rank 1": [ranks[1]], "all": list(ranks.values()), "launcher": [self.process.pid]}
        above = parent_of(ranks[0])
        assert above is not None
        return found if above == self.process.pid else {**found, "launch.py": [above]}

    def end(self, seconds: float = SECONDS) -> float:
        """Wait until nothing of it is left; the seconds that took."""
        begun = time.monotonic()
        self.wait_until(self._is_gone, "the end of all processes", seconds)
        return time.monotonic() - begun

    def _is_gone(self) -> bool:
        self.process.poll()
        return not processes_with(self.mark)

    def ended(self) -> dict[str, Any]:
        """What exit.json says."""
        return json.loads((self.folder / "exit.json").read_text())  # type: ignore[no-any-return]

    def events(self) -> list[str]:
        """What happened, by events.jsonl."""
        return [json.loads(line)["event"] for line in (self.folder / "events.jsonl").read_text().splitlines()]


def send(processes: list[int], number: int) -> None:
    """Send a signal to processes that may be gone already."""
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def _rank_of(process: int) -> int | None:
    try:
        words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)
