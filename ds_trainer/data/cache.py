"""What is computed once and kept: folders of memory-mapped files that appear whole or not at all.

Any number of processes may ask for the same folder at once. One builds it in a temporary folder beside it, under a lock
that the kernel releases when its owner dies; the others wait. Only the rename at the end makes the folder visible.
So that the process which shows its progress is the one that builds, the others give it a head start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ds_trainer.data.pack import Ints, Rows, Segments
from ds_trainer.data.sources import Report
from ds_trainer.data.tokenize import Document
from ds_trainer.errors import DataError

META = "meta.json"
HASHED_WHOLE_BYTES = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 20
_POLL_SECONDS = 0.05
_STARTED = time.time()
"""A failure written down before this process began is that of an earlier start."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokenised documents, memory-mapped. Document d holds tokens[offsets[d] : offsets[d + 1]]."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    offsets: Ints
    """(num_documents + 1)."""
    spans: Ints
    """(num_spans, 2): trained token positions, relative to their document: first, and one after the last."""
    span_offsets: Ints
    """(num_documents + 1): document d has spans[span_offsets[d] : span_offsets[d + 1]]."""


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


def build_once(
    folder: Path,
    build: Callable[[Path], Mapping[str, Any]],
    *,
    what: str,
    report: Report,
    head_start: float = 0.0,
) -> dict[str, Any]:
    """Make sure that `folder` exists and is whole; build it if need be.

    Args:
        folder: its name must tell everything that its content depends on.
        build: fills the empty folder it is given, and returns what is to be known about it; kept in `meta.json`.
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
        _wait_for_a_builder(folder, lock, head_start)
        with _lock(lock, what, report) as failure:
            meta, damage = _read_meta(folder)  # another process may have built it while this one waited
            if meta is not None:
                return meta
            if damage:
                report(f"{folder}: damaged ({damage}); built again")
                shutil.rmtree(folder)
            try:
                return _build(folder, build)
            except DataError as error:
                failure(str(error))
                raise
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: the cache of {what} cannot be written: {error.strerror}. "
            "Set data.cache_folder to a folder with room and write permission."
        ) from error


def write_tokens(folder: Path, documents: Iterable[Document], dtype: DTypeLike) -> dict[str, int]:
    """Write documents as they come; memory does not grow with their number.

    Args:
        folder: an existing folder.
        documents: in the order they are to be numbered.
        dtype: uint16 or uint32; must hold every token id.

    Returns:
        `documents`, `tokens`, `trained_tokens` and `max_token_id` (-1 if there is no token).
    """
    num_documents = num_tokens = num_spans = num_trained = 0
    max_token_id = -1
    with ExitStack() as files:
        tokens = files.enter_context(open(folder / "tokens.bin", "wb", buffering=1 << 20))
        offsets = files.enter_context(_appended_array(folder / "offsets.npy"))
        spans = files.enter_context(_appended_array(folder / "spans.npy", columns=2))
        span_offsets = files.enter_context(_appended_array(folder / "span_offsets.npy"))
        offsets([0])
        span_offsets([0])
        for document in documents:
            ids = np.array(document.ids, dtype=dtype)
            tokens.write(ids.data)
            num_documents += 1
            num_tokens += len(ids)
            max_token_id = max(max_token_id, max(document.ids, default=-1))
            for first, end in document.trained:
                spans([first, end])
                num_spans += 1
                num_trained += end - first
            offsets([num_tokens])
            span_offsets([num_spans])
    return {
        "documents": num_documents,
        "tokens": num_tokens,
        "trained_tokens": num_trained,
        "max_token_id": max_token_id,
    }


def open_tokens(folder: Path, dtype: DTypeLike) -> Tokens:
    """Map what `write_tokens` wrote."""
    size = (folder / "tokens.bin").stat().st_size
    return Tokens(
        # A file without bytes cannot be mapped.
        tokens=_plain(np.memmap(folder / "tokens.bin", dtype, mode="r")) if size else np.zeros(0, dtype),
        offsets=_map(folder / "offsets.npy"),
        spans=_map(folder / "spans.npy"),
        span_offsets=_map(folder / "span_offsets.npy"),
    )


def write_rows(folder: Path, rows: Rows) -> None:
    """Write a plan of rows."""
    np.save(folder / "row_offsets.npy", rows.offsets)
    np.save(folder / "segment_documents.npy", rows.segments.document)
    np.save(folder / "segment_starts.npy", rows.segments.start)
    np.save(folder / "segment_lengths.npy", rows.segments.length)


def open_rows(folder: Path) -> Rows:
    """Map what `write_rows` wrote."""
    return Rows(
        offsets=_map(folder / "row_offsets.npy"),
        segments=Segments(
            document=_map(folder / "segment_documents.npy"),
            start=_map(folder / "segment_starts.npy"),
            length=_map(folder / "segment_lengths.npy"),
        ),
    )


def _build(folder: Path, build: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Build and publish; the caller holds the lock."""
    prefix = f".{folder.name}.building."
    for left_behind in folder.parent.glob(prefix + "*"):  # by an owner that was killed
        shutil.rmtree(left_behind)
    temporary = folder.with_name(f"{prefix}{socket.gethostname()}.{os.getpid()}")
    temporary.mkdir()
    try:
        meta = dict(build(temporary))
        meta["files"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        (temporary / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        temporary.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
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


def head_start_of(rank: int, local_rank: int) -> float:
    """How long a rank leaves the building to another: rank zero, whose terminal shows the progress, begins at once.

    Where the cache is on a shared disk, rank zero's files serve all hosts; where it is not, the first rank of each host
    builds after seconds. The others wait for it until it is clear that it does not come.
    """
    if rank == 0:
        return 0.0
    return 3.0 if local_rank == 0 else 60.0


def _wait_for_a_builder(folder: Path, lock: Path, seconds: float) -> None:
    """Return when somebody has begun to build the folder since this process began, or the time is up.

    The lock itself is not tried: for the moment that takes, the builder would find it held.

    Raises:
        DataError: the builder came and has already failed.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and not folder.exists():
        with contextlib.suppress(FileNotFoundError), open(lock, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mtime >= _STARTED and _owner(file):
                if failure := _failure(file):
                    raise DataError(failure)
                return
        time.sleep(_POLL_SECONDS)


@contextmanager
def _lock(path: Path, what: str, report: Report) -> Iterator[Callable[[str], None]]:
    """Hold the lock file; gives a function that writes down in it why the build failed.

    Raises:
        DataError: the process that was waited for failed; this one would fail in the same way, as late.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that builds the {what}: {_owner(file) or 'one just begun'} ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
            if failure := _failure(file):
                raise DataError(failure) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()

        def failed(text: str) -> None:
            file.write(text)
            file.flush()

        yield failed


def _owner(file: IO[str]) -> str:
    """Who holds the lock, or held it last: the first line; empty when nobody has."""
    file.seek(0)
    return file.readline().strip()


def _failure(file: IO[str]) -> str:
    """Why the last build failed: what follows the first line; empty when it did not."""
    file.seek(0)
    return file.read().partition("\n")[2]


@contextmanager
def _appended_array(path: Path, columns: int | None = None) -> Iterator[Callable[[Sequence[int]], None]]:
    """An int64 .npy file that grows: gives a function that appends one row (or number). The header is completed at the end."""
    count = 0
    width = columns or 1

    def write_header(file: IO[bytes]) -> None:
        shape = (count,) if columns is None else (count, columns)
        # numpy pads a header so that its first dimension can grow in place.
        np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": "<i8"})

    with open(path, "wb", buffering=1 << 20) as file:
        write_header(file)

        def append(values: Sequence[int]) -> None:
            nonlocal count
            file.write(np.array(values, "<i8").data)
            count += len(values) // width

        yield append
        file.seek(0)
        write_header(file)


def _map(path: Path) -> Ints:
    return _plain(np.load(path, mmap_mode="r"))


def _plain(mapped: NDArray[Any]) -> NDArray[Any]:
    """The same pages without numpy's memmap class, whose slices are several times slower to make."""
    return mapped.view(np.ndarray)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
