"""Tokenise chunks in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, process
from itertools import chain, islice
from typing import TYPE_CHECKING

from ds_trainer.data.chunks import Chunk, TokenizedChunk
from ds_trainer.errors import DataError

if TYPE_CHECKING:
    from ds_trainer.data.tokenize import ChunkTokenizer, Recipe

SMALL_CHUNKS = 8
"""Up to here, starting processes would take longer than the work."""

_tokenizers: Sequence[ChunkTokenizer] = ()
"""In a worker process: one for each source."""


def all_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


class TokenizerPool:
    """Processes that tokenise. A worker that dies or does not answer in time is an error that says so."""

    def __init__(self, recipes: Sequence[Recipe], *, workers: int, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._executor: ProcessPoolExecutor | None = None
        self._own: Sequence[ChunkTokenizer] = ()
        if workers:
            # Not forked: this process may already hold threads and devices.
            spawn = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, spawn, _begin, (tuple(recipes),))
        else:
            from ds_trainer.data.tokenize import ChunkTokenizer

            self._own = [ChunkTokenizer(recipe) for recipe in recipes]

    def submit(self, chunk: Chunk, source: int = 0) -> Callable[[], TokenizedChunk]:
        """Begin to tokenise a chunk; gives a function that waits for the result.

        Without processes the work is done when the result is asked for.
        """
        if self._executor is None:
            return lambda: self._own[source](chunk)
        try:
            future = self._executor.submit(_tokenize, chunk, source)
        except process.BrokenProcessPool:  # one was killed before it was given this chunk
            raise _killed(chunk) from None
        return lambda: self._result(chunk, future)

    def close(self) -> None:
        """End the workers, also one that is stopped; what they still do is dropped."""
        if self._executor is not None:
            for worker in self._workers():
                worker.kill()
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _workers(self) -> list[multiprocessing.process.BaseProcess]:
        # Not all children of this process: another pool, or whoever writes a checkpoint, may have some too.
        return list((self._executor._processes or {}).values()) if self._executor else []

    def _result(self, chunk: Chunk, future: Future[TokenizedChunk]) -> TokenizedChunk:
        try:
            return future.result(self._timeout)
        except process.BrokenProcessPool:
            raise _killed(chunk) from None
        except TimeoutError:
            states = ", ".join(f"{worker.pid} {_state(worker.pid)}" for worker in self._workers())
            raise DataError(
                f"a tokenising process did not answer for {self._timeout:.0f} s (data.timeout_seconds) while {_where(chunk)} "
                f"was tokenised. The processes: {states or 'none is left'}."
            ) from None


def tokenize_in_order(
    chunks: Iterable[Chunk], recipe: Recipe, *, workers: int, timeout_seconds: float
) -> Iterator[tuple[Chunk, TokenizedChunk]]:
    """Tokenise chunks; each comes with its tokens, in the order they are given.

    Memory is bounded: a chunk is read only when a worker will soon be free for it.

    Args:
        chunks: as the reader makes them.
        recipe: how records become tokens.
        workers: processes; a few chunks, or one worker's work, are done in this one.
        timeout_seconds: for one chunk.

    Raises:
        DataError: a worker was killed, or did not answer in time.
    """
    iterator = iter(chunks)
    first = list(islice(iterator, SMALL_CHUNKS)) if workers > 1 else []
    if len(first) < SMALL_CHUNKS:
        workers = 0
    pool = TokenizerPool([recipe], workers=workers, timeout_seconds=timeout_seconds)
    waiting: deque[tuple[Chunk, Callable[[], TokenizedChunk]]] = deque()
    try:
        for chunk in chain(first, iterator):
            waiting.append((chunk, pool.submit(chunk)))
            if len(waiting) > 2 * workers:
                done, result = waiting.popleft()
                yield done, result()
        for done, result in waiting:
            yield done, result()
    finally:
        pool.close()


def _where(chunk: Chunk) -> str:
    return f"{chunk.path}, from line {chunk.first} on"


def _killed(chunk: Chunk) -> DataError:
    return DataError(
        f"a tokenising process was killed while {_where(chunk)} was tokenised. For want of memory? `dmesg` tells; "
        "fewer processes need less: `prepare --workers`, or data.workers when streaming."
    )


def _state(pid: int | None) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "(unknown)"
    return {"T": "(stopped)", "D": "(waits for a disk)", "Z": "(dead)"}.get(letter, "(running)")


def _begin(recipes: Sequence[Recipe]) -> None:
    """Make this process a worker: one thread, deaf to Ctrl-C, which its parent answers, and gone when its parent is."""
    global _tokenizers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    from ds_trainer.data.tokenize import ChunkTokenizer

    _tokenizers = [ChunkTokenizer(recipe) for recipe in recipes]


def _tokenize(chunk: Chunk, source: int) -> TokenizedChunk:
    return _tokenizers[source](chunk)
