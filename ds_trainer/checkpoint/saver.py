"""Save so that a checkpoint either is complete or does not exist, while training goes on.

The steps, and what a kill between any two of them leaves behind, are in docs/design/checkpoints.md.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ds_trainer import comm, faults, whereabouts
from ds_trainer.checkpoint import layout
from ds_trainer.checkpoint.keep import Keep, Kept, from_best_on, to_remove
from ds_trainer.checkpoint.slices import SliceKey, file_name, write_slices
from ds_trainer.errors import CheckpointError

T = TypeVar("T")

FOLDER_APPEARS_SECONDS = 120.0
"""How long a network file system may take to show a rank the folder that rank zero made."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was written."""

    path: Path
    step: int
    num_bytes: int
    """Of all files of all ranks."""
    seconds: float
    """From the first byte to the commit."""
    untidy: str | None
    """Why `latest` or the removal of older checkpoints failed, on rank zero."""


@dataclass(slots=True)
class Writer:
    """What a thread that writes was last seen doing."""

    moved: bool = False
    """It has written some since somebody last looked."""
    votes: bool = False
    """It waits for the other ranks."""

    def wrote(self) -> None:
        """Some was written."""
        self.moved = True


class Saver:
    """Writes checkpoints of one run, at most one at a time. Every rank has one and calls the same methods."""

    def __init__(self, folder: Path, keep: Keep, *, background: bool) -> None:
        """Take the run's `checkpoints` folder, which all ranks see."""
        self._folder = folder
        self._keep = keep
        self.background = background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Saved] | None = None
        self._writer = Writer()

    def start(self, step: int, slices: Mapping[SliceKey, Tensor], fields: dict[str, Any]) -> None:
        """Begin to write a checkpoint. Collective. Call `wait` first: while one is being written no other begins.

        Args:
            step: optimizer steps that are complete.
            slices: this rank's part of the state, which nobody changes while it is written.
            fields: what the manifest says besides the files; rank zero's are written.
        """
        assert self._writing is None
        self._writing = self._thread.submit(write_checkpoint, self._folder, step, slices, fields, self._keep, self._writer)

    def poll(self) -> Saved | None:
        """The checkpoint that became complete since the last call, if one did.

        Raises:
            CheckpointError: it could not be written; nothing with a finished checkpoint's name is left behind.
        """
        if self._writing is None or not self._writing.done():
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def wait(self) -> None:
        """Wait until none is being written; `poll` tells what became of it."""
        while self._writing is not None and not wait([self._writing], timeout=1.0).done:
            # A large file takes longer than any step may. A disk that does not answer moves nothing; a vote has a limit itself.
            if self._writer.moved or self._writer.votes:
                self._writer.moved = False
                whereabouts.alive()


def write_checkpoint(
    folder: Path,
    step: int,
    slices: Mapping[SliceKey, Tensor],
    fields: dict[str, Any],
    keep: Keep,
    writer: Writer | None = None,
) -> Saved:
    """Write a checkpoint, make it the newest and remove what is not kept. Collective, on the BACKGROUND group.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimizer steps that are complete.
        slices: this rank's part of the state.
        fields: what the manifest says besides the files.
        keep: which older ones stay.
        writer: told how it goes on.

    Raises:
        CheckpointError: on every rank, when one could not write.
    """
    started = time.monotonic()
    writer = writer or Writer()
    name = layout.checkpoint_name(step)
    final, partial = folder / name, folder / f"{layout.PARTIAL}{name}"
    num_bytes = sum(comm.gather_objects(sum(each.nbytes for each in slices.values()), comm.BACKGROUND))

    def begin() -> None:
        faults.point("save_begin")
        folder.mkdir(parents=True, exist_ok=True)
        remove([partial])
        if (free := shutil.disk_usage(folder).free) < num_bytes:
            raise CheckpointError(f"it takes {layout.in_words(num_bytes)}, and {layout.in_words(free)} are free")
        partial.mkdir()
        layout.fsync_folder(folder)
        faults.point("save_folder_made")

    def write() -> tuple[str, dict[str, Any]]:
        _wait_for(partial)
        path = partial / file_name(comm.rank())
        written = path.name, write_slices(path, slices, writer.wrote)
        faults.point("save_written")
        return written

    def commit() -> None:
        manifest = {"format": layout.FORMAT, "step": step, **fields, "files": dict(sorted(files))}
        faults.point("save_before_manifest")
        layout.write_manifest(partial, manifest)
        remove([final])  # it exists when a run that was resumed from an older step passes here again
        faults.point("save_before_rename")
        partial.rename(final)
        faults.point("save_renamed")
        layout.fsync_folder(folder)

    only_zero = comm.rank() == 0
    _all_or_none(begin if only_zero else None, folder, partial, writer)
    files = [each for each in _all_or_none(write, folder, partial, writer) if each is not None]
    faults.point("save_voted")
    _all_or_none(commit if only_zero else None, folder, partial, writer)
    seconds = time.monotonic() - started
    untidy = _tidy(folder, name, keep) if only_zero else None
    faults.point("save_done")
    return Saved(final, step, num_bytes, seconds, untidy)


def _tidy(folder: Path, name: str, keep: Keep) -> str | None:
    """Let `latest` follow and remove what is not kept. Returns what went wrong: the checkpoint is complete all the same."""
    try:
        layout.write_name(folder, layout.LATEST, name)
        faults.point("save_before_prune")
        there = kept(folder)
        if best := from_best_on(there):
            layout.write_name(folder, layout.BEST, layout.checkpoint_name(best[0].step))
        remove([folder / layout.checkpoint_name(each) for each in to_remove(there, keep)])
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return None


def kept(folder: Path) -> list[Kept]:
    """What the choice of the checkpoints to remove needs to know of each that is complete.

    They are judged by what the newest was judged by: a run may be continued with another metric.
    """
    found: list[Kept] = []
    asked = None
    for path in reversed(layout.complete_checkpoints(folder)):
        try:
            manifest = layout.read_manifest(path)
        except ValueError:
            continue  # damaged: the next start says so and sets it aside
        num_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
        badness = None
        if judged := layout.judged_of(manifest):
            asked = asked or (judged["metric"], judged["goal"])
            if asked == (judged["metric"], judged["goal"]):
                badness = judged["value"] if judged["goal"] == "lowest" else -judged["value"]
        found.append(Kept(manifest["step"], badness, num_bytes))
    return found


def remove(checkpoints: list[Path]) -> None:
    """Remove checkpoints so that a half-removed one is never taken for a complete one."""
    for path in checkpoints:
        if path.exists():
            doomed = path.parent / f"{layout.REMOVED}{path.name.removeprefix(layout.PARTIAL)}"
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            faults.point("save_half_pruned")
            shutil.rmtree(doomed, ignore_errors=True)


def _wait_for(folder: Path) -> None:
    deadline = time.monotonic() + FOLDER_APPEARS_SECONDS
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"rank zero made {folder}, and this host does not see it. Put checkpoint.folder on a file system that all "
                "hosts share"
            )
        time.sleep(0.1)


def _all_or_none(action: Callable[[], T] | None, folder: Path, partial: Path, writer: Writer) -> list[T | None]:
    """Do something on this rank; if it failed on any, raise on all. Collective, on the BACKGROUND group.

    Returns:
        What it returned on each rank, by rank.
    """
    result, problem = None, None
    try:
        if action is not None:
            result = action()
    except OSError as error:
        problem = f"{error.strerror}: {error.filename or folder}"
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # said in the vote: the other ranks wait there
        problem = f"{type(error).__name__}: {error}"
    writer.votes = True
    everyone = comm.gather_objects((result, problem), comm.BACKGROUND)
    writer.votes = False
    failed = [(rank, text) for rank, (_, text) in enumerate(everyone) if text is not None]
    if failed:
        raise _not_written(*failed[0], folder, partial)
    return [each for each, _ in everyone]


def _not_written(rank: int, text: str, folder: Path, partial: Path) -> CheckpointError:
    """What to say about a failed save. Removes what was written of it."""
    if comm.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    complete = layout.complete_checkpoints(folder)
    return CheckpointError(
        f"the checkpoint {partial.name.removeprefix(layout.PARTIAL)} could not be written in {folder} (rank {rank}: {text}). "
        + (f"{complete[-1].name} is complete and kept." if complete else "There is no earlier checkpoint.")
        + " Free space or move checkpoint.folder to a larger disk, and start the same command again."
    )
