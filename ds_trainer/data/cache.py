"""What is computed once and kept: folders that appear whole or not at all.

Any number of processes may ask for the same folder at once. One builds it in a temporary folder beside it, under a lease
that its death gives back; the others wait. Only the rename at the end makes the folder visible.
So that the process which shows its progress is the one that builds, the others give it a head start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds_trainer.data.lease import Lease, lease, this_host, wait_for_a_builder
from ds_trainer.data.sources import Report
from ds_trainer.errors import DataError

META = "meta.json"
HASHED_WHOLE_BYTES = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 20
_SETTLED_SECONDS = 2.0
"""A file that was changed less than this before it was hashed may be changed again without a new time."""

Build = Callable[[Path, Lease], Mapping[str, Any]]


def fingerprint(parts: Any) -> str:
    """A short name for anything that JSON can write: equal parts, equal name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def describe_file(path: Path) -> dict[str, Any]:
    """Size, mtime and a hash that changes with the content.

    A file up to 64 MiB is hashed as a whole, so that a copy or a touched file counts as the same. Of a larger one 16
    blocks are hashed together with size and mtime.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size <= HASHED_WHOLE_BYTES:
                digest = hashlib.file_digest(file, "sha256")
            else:
                digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
                for block in range(_SAMPLES):
                    file.seek(block * (status.st_size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror} ({path.absolute()}).") from None
    return {
        "path": str(path),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": digest.hexdigest(),
    }


def describe_files(paths: Iterable[Path], memory: Path) -> list[dict[str, Any]]:
    """`describe_file` of each; what has kept size, time and inode since the last start is not read again.

    Args:
        paths: files.
        memory: where to remember them; a file of ours that may be missing or deleted.
    """
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    described, fresh = [], {}
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror} ({path.absolute()}).") from None
        key = f"{path.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
        if key in known:
            found = {"path": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": known[key]}
        else:
            found = describe_file(path)
            if time.time() - status.st_mtime > _SETTLED_SECONDS:
                fresh[key] = found["sha256"]
        described.append(found)
    if fresh:
        temporary = memory.with_name(f".{memory.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(known | fresh), encoding="utf-8")
            temporary.rename(memory)
        except OSError:  # the build that follows says so if nothing can be written here
            with suppress(OSError):
                temporary.unlink()
    return described


def build_once(
    folder: Path,
    build: Build,
    *,
    what: str,
    report: Report,
    head_start: float = 0.0,
) -> dict[str, Any]:
    """Make sure that `folder` exists and is whole; build it if need be.

    Args:
        folder: its name must tell everything that its content depends on.
        build: fills the folder it is given, and returns what is to be known about it; kept in `meta.json`. The folder may
            hold what an earlier build on this host, now dead, had written.
        what: names the content in reports.
        report: is told about waiting, and about a damaged folder that is built again.
        head_start: seconds that another process is given to begin, before this one builds; see `head_start_of`.

    Returns:
        What `build` returned, now or in an earlier process, and the sizes of the files.

    Raises:
        DataError: `build` raised it, here or in the process that was waited for; or the folder cannot be written.
    """
    meta, damage = _read_meta(folder)
    if meta is not None:
        return meta
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(folder.name + ".lock")
        wait_for_a_builder(lock, head_start, folder)
        with lease(lock, what, report) as held:
            meta, damage = _read_meta(folder)  # another process may have built it while this one waited
            if meta is not None:
                return meta
            if damage:
                report(f"{folder}: damaged ({damage}); built again")
                shutil.rmtree(folder)
            return _build(folder, build, held)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: the cache of {what} cannot be written: {error.strerror}. "
            "Set data.cache_folder to a folder with room and write permission."
        ) from error


def head_start_of(rank: int, local_rank: int) -> float:
    """How long a rank leaves the building to another: rank zero, whose terminal shows the progress, begins at once.

    Where the cache is on a shared disk, rank zero's files serve all hosts; where it is not, the first rank of each host
    builds after seconds. The others wait for it until it is clear that it does not come.
    """
    if rank == 0:
        return 0.0
    return 3.0 if local_rank == 0 else 60.0


def _build(folder: Path, build: Build, held: Lease) -> dict[str, Any]:
    """Build and publish; the caller holds the lease."""
    prefix = f".{folder.name}.building."
    # A host of its own: where locks are kept to each host, two may build at once, and the second rename fails.
    temporary = folder.with_name(prefix + this_host())
    temporary.mkdir(exist_ok=True)
    try:
        meta = dict(build(temporary, held))
        meta["files"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        (temporary / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        temporary.rename(folder)
        _sync(folder.parent)
    except BaseException as error:
        theirs, _ = _read_meta(folder)
        if theirs is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            return theirs
        if not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    for left_behind in folder.parent.glob(prefix + "*"):  # by builders on other hosts that were killed
        shutil.rmtree(left_behind, ignore_errors=True)
    return meta


def _read_meta(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """What is known about a whole folder, or None and the damage; no damage if the folder does not exist."""
    if not folder.exists():
        return None, ""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        for name, size in meta["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                return None, f"{name} has {found} bytes instead of {size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return meta, ""


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
