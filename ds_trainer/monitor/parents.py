"""Notice that the launcher is gone, so that no worker outlives it.

Above a worker there is torchrun, or DeepSpeed's launch.py. Above that there is DeepSpeed's runner on one node; with pdsh it is
the ssh session, or its shell and above that the session. A runner that is ended by SIGTERM on one node tells nobody, nor
does a session whose connection is lost: launch.py and the workers would go on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_RUNNER = re.compile(r"(^|/)(deepspeed|ds)(\.pt)?$|deepspeed[./]launcher[./]runner(\.py)?$")
"""A word of the runner's command line: the script of the package, or the module behind it."""
_LAUNCH = re.compile(r"deepspeed[./]launcher[./]launch(\.py)?$")
_SESSION = re.compile(r"sshd(-session)?:")
"""How sshd names the process of a connection; sshd-session since OpenSSH 9.8."""


@dataclass(frozen=True, slots=True)
class Parents:
    """The processes that must be there for as long as this one works."""

    parent: int
    """torchrun's agent or DeepSpeed's launch.py."""
    above: tuple[tuple[int, int, str], ...] = ()
    """(process, its parent, the parent in words): what launch.py hangs on. Above torchrun anything may leave as it likes."""

    @classmethod
    def now(cls) -> Parents:
        """Those of this process, while they are still there."""
        parent = os.getppid()
        return cls(parent, tuple(_above_launch(parent)) if is_launch(command_of(parent)) else ())

    def command(self) -> list[str]:
        """The launcher's command line as it was typed; empty where it was typed on another host."""
        commands = [command_of(self.parent), *(command_of(parent) for _, parent, _ in self.above[:1])]
        return commands[-1] if is_runner(commands[-1]) or len(commands) == 1 else []

    def gone(self) -> str | None:
        """Which of them is no longer there, in words; None while all are. A process that lost its parent is given another."""
        if os.getppid() != self.parent:
            return f"its launcher (process {self.parent}) is gone"
        for process, parent, words in self.above:
            if parent_of(process) != parent:
                return f"{words} (process {parent}) is gone"
        return None


def _above_launch(process: int) -> Iterator[tuple[int, int, str]]:
    """The links from launch.py up to DeepSpeed's runner or to the ssh session; none where it was started in another way."""
    above = parent_of(process)
    command = command_of(above) if above else []
    if above and is_runner(command):
        yield process, above, "the deepspeed command"
    elif above and is_session(command):
        yield process, above, "the ssh session of the deepspeed command"
    elif above:  # a shell that does not end by becoming its last command
        session = parent_of(above)
        if session and is_session(command_of(session)):
            yield process, above, "the shell of the deepspeed command"
            yield above, session, "the ssh session of the deepspeed command"


def is_runner(command: list[str]) -> bool:
    """Whether a command line is that of DeepSpeed's runner: `deepspeed ...`, or python with its script or module."""
    # Options of ours could hold the word too: only python's own come before the script.
    return any(_RUNNER.search(word) for word in command[:3])


def is_launch(command: list[str]) -> bool:
    """Whether a command line is that of DeepSpeed's launch.py: python, with -u -m before the module."""
    return any(_LAUNCH.search(word) for word in command[:4])


def is_session(command: list[str]) -> bool:
    """Whether a command line is that of an sshd that serves one connection."""
    return bool(command) and _SESSION.match(command[0]) is not None


def parent_of(process: int) -> int | None:
    """The process that started it, or took it over; None when it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])


def command_of(process: int) -> list[str]:
    """Its command line in words; empty when it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")[:-1]
    except OSError:
        return []
