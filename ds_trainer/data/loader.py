"""From rows to the windows a rank feeds, read ahead in the background."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

from ds_trainer.data.order import Order, positions_of_window
from ds_trainer.data.rows import TokenRows
from ds_trainer.errors import TrainingError
from ds_trainer.protocols import MicroBatch

Batch = TypeVar("Batch")
Job = tuple[str, Callable[[], list[Batch]]]
"""What is read, in words, and the reading of it."""
Tasks = SimpleQueue[tuple[Future[list[Batch]], Callable[[], list[Batch]]] | None]

_CLOSE_SECONDS = 1.0


class Windows(Generic[Batch]):
    """An iterator over the windows of one rank that keeps account of the time spent waiting for them.

    Windows are read ahead by threads: reading copies from the file cache, which takes a fraction of a step. One that does not
    arrive in time (a disk that is gone, a worker that hangs) is an error that says what was being read.
    """

    def __init__(self, jobs: Iterator[Job[Batch]], *, workers: int, timeout_seconds: float) -> None:
        self.waited_seconds = 0.0
        """Time the loop has stood waiting for data, in all."""
        self.cursors: dict[str, list[int]] = {}
        """Where a stream is; empty for rows, whose position is a number."""
        self._jobs = jobs
        self._timeout = timeout_seconds
        self._ahead = 2 * workers
        self._waiting: deque[tuple[str, Future[list[Batch]]]] = deque()
        self._tasks: Tasks[Batch] = SimpleQueue()
        # Daemons, as an executor's threads are not: one that hangs must not keep the process from ending.
        self._threads = [Thread(target=_work, args=(self._tasks,), name=f"data_{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Windows[Batch]:
        return self

    def __next__(self) -> list[Batch]:
        begun = time.monotonic()
        try:
            return self._read_ahead() if self._threads else next(self._jobs)[1]()
        finally:
            self.waited_seconds += time.monotonic() - begun

    def close(self) -> None:
        """End the threads; what they still read is dropped."""
        for _, future in self._waiting:
            future.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(_CLOSE_SECONDS)

    def _read_ahead(self) -> list[Batch]:
        while len(self._waiting) <= self._ahead and (job := next(self._jobs, None)) is not None:
            what, read = job
            future: Future[list[Batch]] = Future()
            self._waiting.append((what, future))
            self._tasks.put((future, read))
        if not self._waiting:
            self.close()
            raise StopIteration
        what, future = self._waiting.popleft()
        try:
            return future.result(self._timeout)
        except TimeoutError:
            raise TrainingError(
                f"no data for {self._timeout:.0f} s (data.timeout_seconds): a worker hangs while it reads {what}. "
                "Is the disk of the cache still there, and is it fast enough?"
            ) from None


def _work(tasks: Tasks[Batch]) -> None:
    while (task := tasks.get()) is not None:
        future, read = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read())
            except BaseException as error:
                future.set_exception(error)
        del task, future, read  # or a window would be kept until the next one comes


def windows(
    rows: TokenRows,
    order: Order,
    *,
    first_position: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    rank: int,
    data_parallel_size: int,
    convert: Callable[[MicroBatch], Batch],
    workers: int = 0,
    timeout_seconds: float = 300.0,
) -> Windows[Batch]:
    """The windows of one rank, a list of gradient_accumulation_steps micro-batches for each optimizer step.

    Args:
        rows: the data; the same on every rank.
        order: which of them comes when. The last window is filled up with empty rows, so that all ranks end at the same step.
        first_position: rows the whole job has consumed; 0, or what a checkpoint says.
        micro_batch_size: rows per rank per forward.
        gradient_accumulation_steps: forwards per rank per optimizer step.
        rank: 0 <= rank < data_parallel_size.
        data_parallel_size: ranks that see different rows.
        convert: what is to be done with each micro-batch ahead of time.
        workers: threads that read ahead; 0 reads when asked.
        timeout_seconds: for one window to arrive.
    """

    def jobs() -> Iterator[Job[Batch]]:
        position = first_position
        while order.total_rows is None or position < order.total_rows:
            window = positions_of_window(
                position,
                micro_batch_size=micro_batch_size,
                gradient_accumulation_steps=gradient_accumulation_steps,
                rank=rank,
                data_parallel_size=data_parallel_size,
            )
            folders = ", ".join(str(store.folder) for pool in rows.pools for store in pool.stores)
            yield f"the rows at position {position} from {folders}", lambda window=window: read_window(window)  # type: ignore[misc]
            position += micro_batch_size * gradient_accumulation_steps * data_parallel_size

    def read_window(window: list[list[int]]) -> list[Batch]:
        return [convert(rows.read([order.row_at(position) for position in positions])) for positions in window]

    return Windows(jobs(), workers=workers, timeout_seconds=timeout_seconds)


def evaluation_batches(
    rows: TokenRows, *, micro_batch_size: int, rank: int, data_parallel_size: int, max_rows: int
) -> Iterator[MicroBatch]:
    """The first `max_rows` rows, each once over all ranks; as many batches on every rank, the last ones with empty rows.

    Args:
        rows: the held-out data; the same on every rank.
        micro_batch_size: rows per rank per forward.
        rank: 0 <= rank < data_parallel_size.
        data_parallel_size: ranks that see different rows.
        max_rows: `evaluate.max_rows`.
    """
    count = min(rows.num_rows, max_rows)
    batches = positions_of_window(
        0,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=-(-count // (micro_batch_size * data_parallel_size)),
        rank=rank,
        data_parallel_size=data_parallel_size,
    )
    for positions in batches:
        yield rows.read([position if position < count else None for position in positions])
