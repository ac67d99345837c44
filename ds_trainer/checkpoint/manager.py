"""Choose which checkpoint a run continues from, and put out of the way what it does not continue from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_trainer import comm
from ds_trainer.checkpoint import layout
from ds_trainer.checkpoint.saver import remove
from ds_trainer.checkpoint.slices import SliceReader
from ds_trainer.errors import ResumeError


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that was verified."""

    path: Path
    manifest: dict[str, Any]

    def slices(self) -> SliceReader:
        """What its files hold together."""
        return SliceReader(sorted(self.path / name for name in self.manifest["files"]))


def find(folder: Path, resume: str, report: Callable[[str], None], *, was_saved: bool) -> Found | None:
    """Choose the checkpoint a run continues from: the newest that verifies. Collective.

    Args:
        folder: the run's `checkpoints` folder.
        resume: `auto`, `never` or a checkpoint's path.
        report: takes a line for the user.
        was_saved: an earlier start of this run has completed a checkpoint.

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
            beside = [str(path) for path in layout.complete_checkpoints(Path(resume).parent) if path != Path(resume)]
            others = ", ".join(beside) or folder / layout.checkpoint_name(100)
            raise ResumeError(f"{resume} cannot be continued: {why}. Name another checkpoint, such as {others}.")
        return found
    rejected = []
    for path in comm.from_rank_zero(list(reversed(layout.complete_checkpoints(folder)))):
        found, why = _verify(path)
        if found is not None:
            return found
        rejected.append(f"{path.name} {why}")
        report(f"checkpoint {path} is passed over: it {why}")
    if comm.from_rank_zero(was_saved) or rejected:
        why = "; ".join(rejected) or "this run has saved, and nothing of it is there"
        raise ResumeError(f"{folder} holds no usable checkpoint ({why}). Restore one, or start anew with --resume never.")
    return None


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what killed saves left behind; rank zero's business. Returns the names."""
    found = layout.leftovers(folder)
    remove(found)
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
        name = layout.checkpoint_name(manifest["step"])
        if path.name.startswith("step_") and path.name != name:  # a copy by any other name may be asked for
            raise ValueError(f"holds what was saved as {name}")
        names = sorted(manifest["files"])
        why = layout.damage(path, names[comm.rank() :: comm.world_size()], manifest["files"])
    except (ValueError, KeyError, OSError) as error:
        manifest, why = {}, str(error)
    reasons = [each for each in comm.gather_objects(why) if each]
    return (None, reasons[0]) if reasons else (Found(path, manifest), "")
