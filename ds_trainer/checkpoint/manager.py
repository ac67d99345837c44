"""Save so that a checkpoint either is complete or does not exist; choose which one a run continues from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_trainer import comm
from ds_trainer.checkpoint import layout
from ds_trainer.errors import CheckpointError, ResumeError


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that was verified."""

    path: Path
    manifest: dict[str, Any]


def save(
    folder: Path,
    step: int,
    write: Callable[[Path, str], None],
    fields: dict[str, Any],
    *,
    keep_last: int,
) -> Path:
    """Write a checkpoint and make it the newest. Collective.

    The one moment at which it begins to exist is a rename, after every file of every rank is on the disk and listed with
    its SHA-256. `latest` follows, then older checkpoints are removed.

    Args:
        folder: the run's `checkpoints` folder, seen by all ranks.
        step: optimizer steps that are complete.
        write: (folder, name) -> writes this rank's files into folder/name; collective.
        fields: what the manifest says besides the files; rank zero's are written.
        keep_last: complete checkpoints that are left, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: a rank could not write; nothing with a finished checkpoint's name is left behind.
    """
    name = layout.checkpoint_name(step)
    final, partial = folder / name, folder / f"{layout.PARTIAL}{name}"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _remove([partial])
        partial.mkdir()

    _all_or_none(begin if comm.rank() == 0 else None, folder, partial)
    try:
        write(folder, partial.name)
    except Exception as error:
        # Said at once, by this rank alone: the others wait in DeepSpeed's own barriers, and would never come to ours.
        raise _not_written(comm.rank(), _in_a_line(error), folder, partial) from error
    files = layout.data_files(partial)
    mine: dict[str, Any] = {}

    def seal_files() -> None:
        for path in files[comm.rank() :: comm.world_size()]:
            layout.fsync_file(path)
            mine[str(path.relative_to(partial))] = layout.digest(path)

    _all_or_none(seal_files, folder, partial)
    listed = {name: entry for part in comm.gather_objects(mine) for name, entry in part.items()}

    def commit() -> None:
        for inner in {path.parent for path in files}:
            layout.fsync_folder(inner)
        manifest = {"format": layout.FORMAT, "step": step, **fields, "files": dict(sorted(listed.items()))}
        layout.write_manifest(partial, manifest)
        _remove([final])  # it exists when a run that was resumed from an older step passes here again
        partial.rename(final)
        layout.fsync_folder(folder)
        _write_latest(folder, name)
        _remove(layout.complete_checkpoints(folder)[:-keep_last])

    _all_or_none(commit if comm.rank() == 0 else None, folder, partial)
    return final


def find(folder: Path, resume: str, report: Callable[[str], None], *, has_history: bool) -> Found | None:
    """Choose the checkpoint a run continues from: the newest that verifies. Collective.

    Args:
        folder: the run's `checkpoints` folder.
        resume: `auto`, `never` or a checkpoint's path.
        report: takes a line for the user.
        has_history: the run folder holds metrics of an earlier start.

    Returns:
        None when the run starts anew.

    Raises:
        ResumeError: the checkpoint that was asked for is not usable, or an earlier start left none that is.
    """
    if resume == "never":
        return None
    if resume != "auto":
        found, why = _verify(Path(resume))
        if found is None:
            raise ResumeError(f"--resume {resume}: {why}. Name a folder such as {folder / layout.checkpoint_name(100)}.")
        return found
    rejected = []
    for path in comm.from_rank_zero(list(reversed(layout.complete_checkpoints(folder)))):
        found, why = _verify(path)
        if found is not None:
            return found
        rejected.append(f"{path.name} {why}")
        report(f"checkpoint {path} is passed over: it {why}")
    if comm.from_rank_zero(has_history) and rejected:
        raise ResumeError(
            f"{folder} holds no usable checkpoint ({'; '.join(rejected)}). Restore one, or start anew with --resume never."
        )
    return None


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what killed saves left behind; rank zero's business. Returns the names."""
    found = layout.leftovers(folder)
    _remove(found)
    return [path.name for path in found]


def set_aside(folder: Path, step: int) -> list[tuple[str, str]]:
    """Rename the checkpoints after a step, so that no later start takes them for the newest; rank zero's business.

    Without it, a run that goes on from an older step would be resumed from them, and `save` would remove its own
    checkpoints as the older ones.

    Returns:
        The old name and the new one of each.
    """
    renamed = []
    for path in layout.complete_checkpoints(folder):
        if int(path.name.removeprefix("step_")) > step:
            number = 1
            while (target := folder / f"aside_{number}_{path.name}").exists():
                number += 1
            path.rename(target)
            renamed.append((path.name, target.name))
    return renamed


def _verify(path: Path) -> tuple[Found | None, str]:
    """Check every file against the manifest, the files shared out among the ranks. Collective."""
    try:
        manifest = layout.read_manifest(path)
        names = sorted(manifest["files"])
        why = layout.damage(path, names[comm.rank() :: comm.world_size()], manifest["files"])
    except (ValueError, KeyError, OSError) as error:
        manifest, why = {}, str(error)
    reasons = [each for each in comm.gather_objects(why) if each]
    return (None, reasons[0]) if reasons else (Found(path, manifest), "")


def _all_or_none(action: Callable[[], None] | None, folder: Path, partial: Path) -> None:
    """Do something on this rank; if it failed on any, raise on all. Collective."""
    problem: str | None = None
    try:
        if action is not None:
            action()
    except Exception as error:  # torch's writer raises RuntimeError for a full disk, DeepSpeed a bare OSError
        problem = _in_a_line(error)
    problems = [(rank, text) for rank, text in enumerate(comm.gather_objects(problem)) if text]
    if not problems:
        return
    raise _not_written(*problems[0], folder, partial)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _not_written(rank: int, text: str, folder: Path, partial: Path) -> CheckpointError:
    """What to say about a failed save. Removes what was written of it."""
    free = shutil.disk_usage(folder if folder.is_dir() else ".").free
    shutil.rmtree(partial, ignore_errors=True)
    kept = layout.complete_checkpoints(folder)
    return CheckpointError(
        f"the checkpoint {partial.name.removeprefix(layout.PARTIAL)} could not be written in {folder} "
        f"(rank {rank}: {text}; {'the disk is full' if free < 1 << 20 else f'{free / 2**30:.2f} GiB were free'}). "
        + (f"{kept[-1].name} is complete and kept." if kept else "There is no earlier checkpoint.")
        + " Free space or move checkpoint.folder to a larger disk, and start the same command again."
    )


def _write_latest(folder: Path, name: str) -> None:
    temporary = folder / f".{layout.LATEST}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(name)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / layout.LATEST)
    layout.fsync_folder(folder)


def _remove(checkpoints: list[Path]) -> None:
    """Remove checkpoints so that a half-removed one is never taken for a complete one."""
    for path in checkpoints:
        if path.exists():
            doomed = path.parent / f"{layout.REMOVED}{path.name.removeprefix(layout.PARTIAL)}"
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
