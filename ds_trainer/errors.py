"""The errors a user can cause or must know of, and the exit code each one ends the process with.

An error of the user's is raised as one of these types, never as an assertion or a library's traceback. `cli.main`
prints the text and exits with `exit_code`; anything else that escapes is a defect of ours or of a library and is
recorded with its traceback in the run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_DONE = 0
"""The run is complete."""
EXIT_FAILED = 1
"""The run failed after it had started."""
EXIT_REFUSED = 2
"""The request was refused before training: arguments, launcher, data or model."""


class DsTrainerError(Exception):
    """Base of the errors whose text is written for the user; it needs no traceback to be understood."""

    exit_code = EXIT_FAILED


class RefusedError(DsTrainerError):
    """The request cannot be carried out as written. Nothing was started."""

    exit_code = EXIT_REFUSED


class LauncherError(RefusedError):
    """The process was not started by an accepted launcher, or the launcher's variables contradict each other."""


class DataError(RefusedError):
    """A data file is missing, unreadable or does not hold what the run file says; the text names path and line."""


class ModelError(RefusedError):
    """The model or tokenizer cannot be loaded, or does not fit the data or the settings."""


class ResumeError(RefusedError):
    """The checkpoint that was asked for cannot be continued by this run; the text says what differs."""


class BuildError(RefusedError):
    """A compiled DeepSpeed op is needed and cannot be built here; the text says what to install."""


class CheckpointError(DsTrainerError):
    """A checkpoint could not be written (disk full, no permission) or is damaged."""


class RankError(RefusedError):
    """The ranks would train different runs: other settings, data, versions or environment on some of them."""

    exit_code = 4


class TrainingError(DsTrainerError):
    """Training cannot go on: a worker that hangs, a lost peer."""


class NonFiniteError(TrainingError):
    """Losses, gradients or weights are not finite, and the settings say that the run ends there."""

    exit_code = 6


class HangError(TrainingError):
    """A rank made no progress for `train.hang_timeout_seconds`."""

    exit_code = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong with what the user wrote."""

    where: str
    """`file:line`, `--set`, or the name of a setting."""
    what: str
    """What was found, the rule it breaks and what to write instead."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class ArgumentsError(RefusedError):
    """Every problem found in the run file, the DeepSpeed JSON and the command line, together."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        unique = list(dict.fromkeys(problems))
        self.problems = tuple(unique)
        count = f"{len(unique)} problems" if len(unique) > 1 else "1 problem"
        super().__init__("\n".join([f"{count} in the settings; nothing was started.", *(f"  {p}" for p in unique)]))
