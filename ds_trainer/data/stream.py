"""Training while tokenising, for a corpus that nobody wants to tokenise first.

The stream is divided into lanes, whose number depends on the data and the global batch size alone. Each lane reads its own
share of every source, shuffles and packs a few chunks at a time, and gives the same number of rows to every step; so a rank
runs only the lanes its rows come from, and any number of ranks continues the same stream. A lane's position is the place in
the files where its present block begins and the rows it has given of that block: a resume reads that block again, and goes
on with the very next row.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ds_trainer.arguments.schema import DataSection
from ds_trainer.data.cache import describe_files, fingerprint
from ds_trainer.data.chunks import Chunk, TokenizedChunk
from ds_trainer.data.formats import Stage
from ds_trainer.data.loader import Windows
from ds_trainer.data.order import turn_at
from ds_trainer.data.pack import Overlong, one_row_each, pack
from ds_trainer.data.prepare import Tally, judge, overlong_of, recipes_of
from ds_trainer.data.readers import read_chunks
from ds_trainer.data.rows import Batch, Block
from ds_trainer.data.sources import FoundSource, Report, find_sources
from ds_trainer.data.tokenize import Recipe
from ds_trainer.data.workers import TokenizerPool
from ds_trainer.errors import DataError
from ds_trainer.protocols import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Converted = TypeVar("Converted")

STREAM_VERSION = 1
"""Raise it when the same files give other chunks, blocks or rows: a stream of an earlier version is then not continued."""
MAX_LANES = 16
LANE_BYTES = 4 << 20
"""A lane gets at least so much of the data, or a file of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPlan:
    """What is streamed, and how. The same on every rank, and on every start of a run."""

    found: tuple[FoundSource, ...]
    recipes: tuple[Recipe, ...]
    data: DataSection
    overlong: Overlong
    seed: int
    global_batch_size: int
    lanes: int
    fingerprint: str
    """Tells this data from other data."""


@dataclass(slots=True)
class Cursor:
    """Where a lane is in one source."""

    epoch: int = 0
    file: int = 0
    """Place in the order of this epoch's files."""
    chunk: int = 0
    """Of that file: where the present block begins."""
    rows: int = 0
    """Rows of the present block that have been given."""

    def as_list(self) -> list[int]:
        """The fields in their order, for a checkpoint."""
        return [self.epoch, self.file, self.chunk, self.rows]


def plan_stream(
    data: DataSection,
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    global_batch_size: int,
    cache_folder: Path,
    report: Report,
) -> StreamPlan:
    """Find the sources of a stream, and decide on its lanes. Reads no more than the beginning of the files.

    Raises:
        DataError: missing data, or data that is tokenised already.
        ModelError: the tokenizer is a slow one.
    """
    found = find_sources(data.sources, stage, report)
    for source in found:
        if source.kind == "tokens":
            raise DataError(f"{source.source.path}: is tokenised already; remove data.streaming, it would gain nothing.")
        if source.source.max_samples is not None:
            raise DataError(f"{source.source.path}: a stream has no max_samples. Remove it, or data.streaming.")
    recipes = recipes_of(found, data, stage, tokenizer, report)
    described = describe_files([path for source in found for path in source.files], cache_folder / "files.json")
    largest = max(1, min(max(len(source.files), _bytes(source) // LANE_BYTES) for source in found))
    lanes = next(each for each in range(min(MAX_LANES, global_batch_size, largest), 0, -1) if global_batch_size % each == 0)
    overlong = overlong_of(data, stage)
    files = "1 file" if len(described) == 1 else f"{len(described):,} files"
    report(f"streaming {files} of {sum(each['bytes'] for each in described) / 2**20:,.0f} MiB, lanes: {lanes}")
    return StreamPlan(
        found=tuple(found),
        recipes=tuple(recipes),
        data=data,
        overlong=overlong,
        seed=seed,
        global_batch_size=global_batch_size,
        lanes=lanes,
        fingerprint=fingerprint(
            {
                "version": STREAM_VERSION,
                "files": [each["sha256"] for each in described],
                "recipes": [recipe.fingerprint_parts() for recipe in recipes],
                "weights": [source.source.weight for source in found],
                "seq_len": data.seq_len,
                "packing": data.packing,
                "overlong": overlong,
                "buffer": data.streaming_buffer,
                "skip": data.on_bad_record,
                "lanes": lanes,
            }
        ),
    )


class Lane:
    """The rows of one lane of one source, in order."""

    def __init__(self, plan: StreamPlan, source: int, lane: int, cursor: Cursor, pool: TokenizerPool, tally: Tally) -> None:
        self._plan, self._source, self._lane, self._pool, self._tally = plan, source, lane, pool, tally
        self.cursor = cursor
        self._blocks = self._read_blocks(replace(cursor))
        self._next: tuple[Cursor, list[tuple[Chunk, Callable[[], TokenizedChunk]]]] | None = None
        self._block: Block | None = None

    def take(self, slot: int, batch: Batch) -> None:
        """Copy the next row into a slot of a batch."""
        row = self.skip()
        assert self._block
        self._block.read(row, slot, batch)

    def skip(self) -> int:
        """Pass over the next row; returns its number in the block."""
        begun = self.cursor.epoch
        while self._block is None or self.cursor.rows >= self._block.num_rows:
            given = self.cursor.rows if self._block is None else 0
            self._open_block()
            self.cursor.rows = given
            if self.cursor.epoch > begun + 3:  # its files may differ from epoch to epoch
                raise DataError(
                    f"{self._plan.found[self._source].source.path}: a lane of the stream has gone through all its records and "
                    "none gives a row: they are bad, empty, too long, or without a token to train on. `ds_trainer prepare` "
                    "with data.streaming=false tells which."
                )
        self.cursor.rows += 1
        return self.cursor.rows - 1

    def _open_block(self) -> None:
        """Make the next block the present one, and have the one after it tokenised meanwhile."""
        begun, results = self._next or self._submitted()
        self._next = self._submitted()
        self.cursor = begun
        chunks = []
        for chunk, result in results:
            tokens = result()
            self._tally.add(chunk.path, tokens)
            chunks.append(tokens)
        self._tally.files_read.clear()  # lanes take turns, so this list would grow with every block
        data = self._plan.data
        judge(self._tally.seen(self._plan.found[self._source].source.path), data, so_far=True)
        self._block = Block(chunks, seq_len=data.seq_len, overlong=self._plan.overlong, arrange=self._arrange)

    def _arrange(self, segments: Any, seq_len: int) -> Any:
        """Shuffle, then pack: rows of one block come in an order of their own."""
        cursor = self.cursor
        name = f"block 1, seed {self._plan.seed}, {self._source} {self._lane} {cursor.epoch} {cursor.file} {cursor.chunk}"
        random = np.random.Generator(np.random.Philox(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")))
        segments = segments.take(random.permutation(len(segments.length)))
        return pack(segments, seq_len) if self._plan.data.packing else one_row_each(segments)

    def _submitted(self) -> tuple[Cursor, list[tuple[Chunk, Callable[[], TokenizedChunk]]]]:
        begun, chunks = next(self._blocks)
        return begun, [(chunk, self._pool.submit(chunk, self._source)) for chunk in chunks]

    def _read_blocks(self, start: Cursor) -> Iterator[tuple[Cursor, list[Chunk]]]:
        """The chunks of block after block, epoch after epoch, from a cursor on."""
        found, lanes = self._plan.found[self._source], self._plan.lanes
        by_file = len(found.files) >= lanes
        while True:
            files = self._files_of(start.epoch)
            nothing = start.file == start.chunk == 0
            for number in range(start.file, len(files)):
                first = start.chunk if number == start.file else 0
                chunks = enumerate(read_chunks(replace(found, files=(files[number],))))
                later = islice(chunks, first, None)
                # Counted from another lane in each file, so that files of few chunks do not all fall to the first lanes.
                own = (each for each in later if by_file or (each[0] + number) % lanes == self._lane)
                while block := list(islice(own, self._plan.data.streaming_buffer)):
                    nothing = False
                    yield Cursor(start.epoch, number, block[0][0]), [chunk for _, chunk in block]
            if nothing:
                raise DataError(
                    f"{found.source.path}: too little data for a stream in {lanes} lanes. Remove data.streaming: so little is "
                    "tokenised in no time."
                )
            start = Cursor(start.epoch + 1)

    def _files_of(self, epoch: int) -> list[Path]:
        """This lane's files in the order of an epoch; all of them where they are too few to be divided."""
        found, lanes = self._plan.found[self._source], self._plan.lanes
        name = f"files 1, seed {self._plan.seed}, source {self._source}, epoch {epoch}"
        # By number, not by path: the same files elsewhere are the same stream.
        order = sorted(range(len(found.files)), key=lambda number: hashlib.sha256(f"{name}, {number}".encode()).digest())
        files = [found.files[number] for number in order]
        return files[self._lane :: lanes] if len(files) >= lanes else files


class StreamWindows(Windows[Converted]):
    """The windows of one rank. `cursors` is where its lanes are after the windows that were taken, by `source.lane`."""

    def __init__(
        self,
        plan: StreamPlan,
        cursors: dict[str, list[int]],
        *,
        first_step: int,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        data_parallel_size: int,
        convert: Callable[[MicroBatch], Converted],
        report: Report,
    ) -> None:
        data = plan.data
        self._pool = TokenizerPool(plan.recipes, workers=data.workers, timeout_seconds=data.timeout_seconds)
        self._after: deque[dict[str, list[int]]] = deque()
        # Without weights, sources come in proportion to the bytes they have, to a thousandth of them all.
        total = sum(_bytes(source) for source in plan.found)
        weights = tuple(source.source.weight or max(1.0, 1000 * _bytes(source) // total) for source in plan.found)
        self._epoch = min((cursor[0] for cursor in cursors.values()), default=0)
        tallies = [Tally() for _ in plan.found]
        lanes: dict[tuple[int, int], Lane] = {}

        def lane_of(source: int, lane: int) -> Lane:
            if (source, lane) not in lanes:
                cursor = Cursor(*cursors.get(f"{source}.{lane}", []))
                lanes[source, lane] = Lane(plan, source, lane, cursor, self._pool, tallies[source])
            return lanes[source, lane]

        share, per_lane = plan.global_batch_size // data_parallel_size, plan.global_batch_size // plan.lanes
        # A rank's rows of a step lie together, so that they come from as few lanes as possible.
        own = range(rank * share, (rank + 1) * share)
        # All rows of its lanes, so that ranks which share a lane agree on where it is.
        places = range(own[0] // per_lane * per_lane, (own[-1] // per_lane + 1) * per_lane)

        def read(step: int) -> list[Converted]:
            batches = [Batch(micro_batch_size, data.seq_len) for _ in range(gradient_accumulation_steps)]
            for place in places:
                # Turned by a lane a step: or sources whose turns fit into a step would come from the same lanes for ever.
                turn = (place + step * per_lane) % plan.global_batch_size
                source, _ = turn_at(step * plan.global_batch_size + turn, weights)
                lane = lane_of(source, place // per_lane)
                if place in own:
                    micro_step, slot = divmod(place - own[0], micro_batch_size)
                    lane.take(slot, batches[micro_step])
                else:
                    lane.skip()
            if lanes and (epoch := min(lane.cursor.epoch for lane in lanes.values())) > self._epoch:
                self._epoch = epoch
                report(f"data: the stream begins epoch {epoch + 1} at step {step + 1}: its records come again")
            self._after.append({f"{source}.{lane}": each.cursor.as_list() for (source, lane), each in lanes.items()})
            return [convert(batch.finished()) for batch in batches]

        def jobs() -> Iterator[tuple[str, Callable[[], list[Converted]]]]:
            step = first_step
            while True:
                yield f"step {step} of the stream", lambda step=step: read(step)  # type: ignore[misc]
                step += 1

        # One thread: each window begins where the last one ended.
        super().__init__(jobs(), workers=1 if data.workers else 0, timeout_seconds=data.timeout_seconds)
        own_lanes = range(places[0] // per_lane, places[-1] // per_lane + 1)
        self.cursors = {name: cursor for name, cursor in cursors.items() if int(name.partition(".")[2]) in own_lanes}

    def __next__(self) -> list[Converted]:
        window = super().__next__()
        self.cursors.update(self._after.popleft())
        return window

    def close(self) -> None:
        """End the processes and the thread, which waits for them."""
        self._pool.close()
        super().close()


def _bytes(source: FoundSource) -> int:
    return sum(path.stat().st_size for path in source.files)
