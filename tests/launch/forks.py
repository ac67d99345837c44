"""Many commands for the price of one start: see workers/forks.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from helpers import clean_environment, run_command

WORKER = Path(__file__).parent / "workers" / "forks.py"


@dataclass
class Kill:
    """A SIGKILL for some ranks, so many seconds after the terminal showed a word; with "" after the start."""

    ranks: list[int]
    when: str
    after: float


@dataclass
class Command:
    arguments: list[str]
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    script: str = ""
    """A Python file that takes the place of ds_trainer."""
    kill: Kill | None = None
    folder: str = ""
    """Where it is run; by default where the commands are."""


@dataclass
class Shown:
    """What a command showed on the terminal, all ranks together, and how its ranks ended."""

    text: str
    codes: list[int]
    seconds: float


def run_all(commands: dict[str, Command], folder: Path, timeout: float = 150) -> dict[str, Shown]:
    asked, results = folder / "commands.json", folder / "results.json"
    asked.write_text(json.dumps({name: asdict(each) for name, each in commands.items()}))
    done = run_command(
        [sys.executable, str(WORKER), str(asked), str(results)], cwd=folder, timeout=timeout, env=clean_environment()
    )
    assert done.code == 0, done.text
    return {name: Shown(**each) for name, each in json.loads(results.read_text()).items()}


class Forks:
    """Runs one command after the other, where the next one depends on what became of the last; a context."""

    def __init__(self, folder: Path) -> None:
        """Take a folder for the terminals' texts."""
        self._log = folder / "forks.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), str(folder)],
                cwd=folder,
                env=clean_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def run(self, command: Command) -> Shown:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asdict(command)), file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()
        assert reply, self._log.read_text()
        return Shown(**json.loads(reply))

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
