"""Notice that the launcher is gone, so that no worker outlives it.

Above a worker there is torchrun, or DeepSpeed's launch.py and above that, on one node, DeepSpeed's runner (with pdsh a shell of
the other host). A runner that is ended by SIGTERM tells nobody: launch.py and the workers would go on.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_RUNNER = re.compile(r"(^|/)(deepspeed|ds)(\.pt)?$|deepspeed[./]launcher[./]runner(\.py)?$")
"""A word of the runner's command line: the script of the package, or the module behind it."""


@dataclass(frozen=True, slots=True)
class Parents:
    """The processes that must be there for as long as this one works."""

    parent: int
    """torchrun's agent or DeepSpeed's launch.py."""
    runner: int | None
    """DeepSpeed's runner, where it is the parent's parent. Any other one, such as a shell, may leave as it likes."""

    @classmethod
    def now(cls) -> Parents:
        """Those of this process, while they are still there."""
        parent = os.getppid()
        above = parent_of(parent)
        return cls(parent, above if above and is_runner(command_of(above)) else None)

    def gone(self) -> str | None:
        """Which of them is no longer there, in words; None while all are. A process that lost its parent is given another."""
        if os.getppid() != self.parent:
            return f"its launcher (process {self.parent}) is gone"
        if self.runner is not None and parent_of(self.parent) != self.runner:
            return f"the deepspeed command (process {self.runner}) is gone"
        return None


def is_runner(command: list[str]) -> bool:
    """Whether a command line is that of DeepSpeed's runner: `deepspeed ...`, or python with its script or module."""
    # Options of ours could hold the word too: only python's own come before the script.
    return any(_RUNNER.search(word) for word in command[:3])


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
