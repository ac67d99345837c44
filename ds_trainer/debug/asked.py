"""What is asked of a debug run, and what of it contradicts itself. Pure; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds_trainer.errors import RefusedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The options of `ds_trainer debug` that say what is run and what is looked for."""

    steps: int | None = None
    """Optimizer steps to run; None is three, and one with `rank`."""
    show_rows: int = 2
    """Rows to print."""
    world_size: int | None = None
    """Ranks whose run this is; None where a checkpoint tells, or for the run of one rank."""
    rank: int | None = None
    """Run only this rank's share of one step."""
    step: int | None = None
    """The first step to run, from 1 as everything that is logged counts; None goes on where the weights are."""
    checkpoint: Path | None = None
    """Begin with its weights and optimizer; None begins with the initial weights."""
    nan_hooks: bool = True
    """Name the first module whose output or gradient is not finite."""
    anomaly: bool = False
    """Name the line of the forward pass whose backward pass makes a NaN."""


def require_consistent(asked: Asked, *, config: Path | None, deepspeed: Path | None, replay: Path | None) -> None:
    """Refuse options that contradict each other, before anything is read.

    Raises:
        RefusedError: with what to write instead.
    """
    if config is None and replay is None:
        raise RefusedError(
            "debug needs a run file: ds_trainer debug --config run.yaml; or a crashed run: ds_trainer debug --replay out/my-run"
        )
    if replay is not None:
        wrong = {"--config": config, "--deepspeed": deepspeed, "--steps": asked.steps, "--world-size": asked.world_size}
        if found := [name for name, value in wrong.items() if value is not None]:
            raise RefusedError(
                f"--replay {replay} with {', '.join(found)}: the run folder says what was run and how far. Leave "
                f"{'it' if len(found) == 1 else 'them'} out; single settings are changed with section.key=value."
            )
    if asked.rank is not None and (asked.steps or 1) > 1:
        raise RefusedError(
            f"--rank {asked.rank} with --steps {asked.steps}: one rank's share makes no update, so there is no step after it. "
            "Leave --steps out, or leave --rank out to run the rows of all ranks."
        )
    if asked.rank is not None and asked.world_size is None and asked.checkpoint is None and replay is None:
        raise RefusedError(f"--rank {asked.rank}: of how many? Add --world-size, for example --world-size {asked.rank + 1}.")
    if asked.world_size is not None:
        require_rank(asked.rank, asked.world_size)


def require_rank(rank: int | None, world_size: int) -> None:
    """Refuse a rank that the run does not have.

    Raises:
        RefusedError: with the ranks there are.
    """
    if rank is not None and rank >= world_size:
        raise RefusedError(f"--rank {rank}: with {world_size} ranks the last one is {world_size - 1}.")


def require_step(step: int, max_steps: int) -> None:
    """Refuse a step that the run does not have.

    Raises:
        RefusedError: with the last one.
    """
    if step > max_steps:
        raise RefusedError(f"--step {step}: the run ends with step {max_steps}. Name one from 1 to {max_steps}.")
