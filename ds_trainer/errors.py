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
"""The run failed after it had started, for a reason that has no code of its own."""
EXIT_REFUSED = 2
"""The request was refused before training: arguments, launcher, model, an op that cannot be built."""
EXIT_DATA = 3
"""The data is missing, unreadable or not what the run file says."""
EXIT_DISAGREEMENT = 4
"""The checkpoint does not fit the run, or the ranks do not fit one another."""
EXIT_CHECKPOINT = 5
"""A checkpoint or the run folder could not be written, or a checkpoint is damaged."""
EXIT_NON_FINITE = 6
"""Loss or gradients were not finite, more often than the settings allow."""
EXIT_HANG = 7
"""A rank made no progress for too long."""
EXIT_OUT_OF_MEMORY = 8
"""The device or the host had no more memory; of `plan`: would have none."""
EXIT_PREEMPTED = 75
"""Asked to end, and saved: start the same command again. The number is EX_TEMPFAIL, which schedulers requeue on."""
EXIT_BY_SIGNAL = 128
"""Plus the number of the signal that ended it at once."""


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

    exit_code = EXIT_DATA


class ModelError(RefusedError):
    """The model or tokenizer cannot be loaded, or does not fit the data or the settings."""


class ResumeError(RefusedError):
    """The checkpoint that was asked for cannot be continued by this run; the text says what differs."""

    exit_code = EXIT_DISAGREEMENT


class DisagreementError(RefusedError):
    """The ranks would train different runs; the text says what differs and on which ranks."""

    exit_code = EXIT_DISAGREEMENT


class BuildError(RefusedError):
    """A compiled DeepSpeed op is needed and cannot be built here; the text says what to install."""


class CheckpointError(DsTrainerError):
    """A checkpoint could not be written (disk full, no permission) or is damaged."""

    exit_code = EXIT_CHECKPOINT


class TrainingError(DsTrainerError):
    """Training cannot go on, for a reason that none of the types below names."""


class NonFiniteError(TrainingError):
    """Losses, gradients or weights are not finite, and the settings say that the run ends there."""

    exit_code = EXIT_NON_FINITE


class HangError(TrainingError):
    """A rank made no progress for too long; the text says which ranks did not arrive, and what each was doing."""

    exit_code = EXIT_HANG


class OutOfMemoryError(TrainingError):
    """The device or the host had no more memory; the text says what holds it and what to change."""

    exit_code = EXIT_OUT_OF_MEMORY


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
