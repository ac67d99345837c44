"""Rows of tokens: planned once over the stores of the documents, written down, and read in any order."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ds_trainer.data.chunks import TokenizedChunk
from ds_trainer.data.pack import Overlong, Rows, Segments, count_targets, cut_documents, one_row_each, pack
from ds_trainer.data.store import ChunkStore, Mapped, Store, TokenStore, ranges
from ds_trainer.protocols import IGNORED, MicroBatch

Ints = NDArray[np.int64]

PACKED_TOGETHER = 1 << 20
"""Documents that are packed together: enough to fill rows, few enough to be held in memory."""
_FORGET_ROWS = 16
"""Often enough that pages stay few where the kernel maps them by the megabyte, and seldom enough to cost nothing."""
_SAMPLES, _SAMPLE = 64, 1024


class Arrangement:
    """Rows over the documents of one or several stores, which are numbered through."""

    def __init__(
        self, stores: Sequence[Store], offsets: Ints, documents: Ints, starts: NDArray[Any], lengths: NDArray[Any]
    ) -> None:
        self.stores = tuple(stores)
        self.offsets, self.documents, self.starts, self.lengths = offsets, documents, starts, lengths
        self._bases = [0, *accumulate(store.num_documents for store in stores)]

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.offsets) - 1

    def read(self, rows: Ints, slots: Ints, batch: Batch) -> None:
        """Copy rows into the slots of a batch."""
        first = self.offsets[rows]
        counts = self.offsets[rows + 1] - first
        segments = ranges(first, counts)
        documents = self.documents[segments]
        starts = self.starts[segments].astype(np.int64)
        lengths = self.lengths[segments].astype(np.int64)
        ends = np.cumsum(lengths)
        begins = ends - lengths
        tokens = np.empty(ends[-1], np.int64)
        # +1 where a trained span begins, -1 where one ends: its running sum says which tokens are trained.
        changes = np.zeros(ends[-1] + 1, np.int8)
        for index, store in enumerate(self.stores):
            if len(self.stores) == 1:
                own: Any = slice(None)
                tokens[:] = store.tokens[ranges(store.first_tokens(documents) + starts, lengths)]
            else:
                own = np.flatnonzero((documents >= self._bases[index]) & (documents < self._bases[index + 1]))
                source = store.first_tokens(documents[own] - self._bases[index]) + starts[own]
                tokens[ranges(begins[own], lengths[own])] = store.tokens[ranges(source, lengths[own])]
            _mark_trained(store, documents[own] - self._bases[index], starts[own], lengths[own], begins[own], changes)
        trained = np.cumsum(changes[:-1], dtype=np.int8).view(np.bool_)
        labels = np.where(trained, tokens, IGNORED)
        positions = np.arange(len(tokens)) - np.repeat(begins, lengths)
        begin = 0
        for slot, end in zip(slots.tolist(), ends[np.cumsum(counts) - 1].tolist(), strict=True):
            batch.fill(slot, tokens[begin:end], labels[begin:end], positions[begin:end])
            begin = end


def _mark_trained(store: Store, documents: Ints, starts: Ints, lengths: Ints, begins: Ints, changes: NDArray[np.int8]) -> None:
    """Mark in `changes` where the trained spans of segments begin and end; the segments lie at `begins`."""
    spans, counts = store.spans_of(documents)
    starts, lengths, begins = (np.repeat(each, counts) for each in (starts, lengths, begins))
    low = np.maximum(spans[:, 0] - starts, 1)  # the first token has nothing to be predicted from
    high = np.minimum(spans[:, 1] - starts, lengths)
    filled = low < high
    # Two spans may touch, but no two begin, and no two end, at one place.
    changes[(begins + low)[filled]] += 1
    changes[(begins + high)[filled]] -= 1


class Pool(Arrangement):
    """Documents that are packed and mixed together, and their rows, in memory-mapped files."""

    stores: tuple[TokenStore, ...]

    def __init__(self, stores: Sequence[TokenStore], rows_folder: Path) -> None:
        self.meta: dict[str, Any] = json.loads((rows_folder / "meta.json").read_text(encoding="utf-8"))
        """What `write_rows` counted."""
        kinds = (("row_offsets", "<i8"), ("documents", "<i8"), ("starts", "<i4"), ("lengths", "<i4"))
        self._mapped = [Mapped(rows_folder / f"{name}.bin", dtype) for name, dtype in kinds]
        super().__init__(stores, *(each.array for each in self._mapped))

    def place(self, document: int) -> tuple[TokenStore, int]:
        """The store of a document of the pool, and its number there."""
        index = bisect_right(self._bases, document) - 1
        return self.stores[index], document - self._bases[index]

    def forget(self) -> None:
        """Give back the memory of the pages that were read."""
        for store in self.stores:
            store.forget()
        for each in self._mapped:
            each.forget()

    def digest(self) -> bytes:
        """Changes with the tokens and with their arrangement; takes milliseconds."""
        digest = hashlib.sha256()
        arrays = [self.offsets, self.documents, *(array for store in self.stores for array in (store.tokens, store.lengths))]
        for array in arrays:
            digest.update(f"{len(array)} ".encode())
            for start in np.linspace(0, max(0, len(array) - _SAMPLE), num=_SAMPLES, dtype=np.int64):
                digest.update(array[start : start + _SAMPLE].tobytes())
        for store in self.stores:
            documents = np.unique(np.linspace(0, max(0, store.num_documents - 1), num=_SAMPLES, dtype=np.int64))
            digest.update(store.spans_of(documents[: store.num_documents])[0].tobytes())
        return digest.digest()


class Block(Arrangement):
    """Chunks of a stream, cut and arranged in memory."""

    def __init__(
        self, chunks: Sequence[TokenizedChunk], *, seq_len: int, overlong: Overlong, arrange: Callable[[Segments, int], Rows]
    ) -> None:
        store = ChunkStore(chunks)
        segments = _trained_segments(store, np.arange(store.num_documents), seq_len, overlong, Counter())
        rows = arrange(segments, seq_len)
        super().__init__([store], rows.offsets, rows.segments.document, rows.segments.start, rows.segments.length)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRows:
    """The data of a run, or what it is evaluated on. Everything is memory-mapped: a rank holds only the rows it reads.

    Rows are numbered through all pools.
    """

    pools: tuple[Pool, ...]
    weights: tuple[float, ...]
    """Of each pool; empty where there is one pool."""
    seq_len: int
    """Positions in a row, padding included."""
    num_tokens: int
    """Tokens of all rows, without padding."""
    num_targets: int
    """Labels of all rows that are not IGNORED."""
    max_token_id: int
    """The largest id in the data: the model's vocabulary must be larger."""
    fingerprint: str
    """Tells this data from other data."""

    @property
    def num_rows(self) -> int:
        """How many rows there are, at least 1."""
        return sum(pool.num_rows for pool in self.pools)

    def read(self, rows: Sequence[int | None]) -> MicroBatch:
        """Read rows; None is the empty row, all padding.

        A label is the next token of the same segment if that one is trained. Positions restart with each segment, and with
        the padded tail.
        """
        batch = Batch(len(rows), self.seq_len)
        base = 0
        for pool in self.pools:
            end = base + pool.num_rows
            slots = [slot for slot, row in enumerate(rows) if row is not None and base <= row < end]
            if slots:
                pool.read(np.array([rows[slot] for slot in slots]) - base, np.array(slots), batch)
            base = end
        return batch.finished()

    def place(self, row: int, segment: int) -> tuple[TokenStore, int]:
        """The store and the document of one segment of a row."""
        for pool in self.pools:
            if row < pool.num_rows:
                return pool.place(int(pool.documents[pool.offsets[row] + segment]))
            row -= pool.num_rows
        raise IndexError(row)

    def forget(self) -> None:
        """Give back the memory of the pages that were read."""
        for pool in self.pools:
            pool.forget()


class Forgetting:
    """Reads rows, and gives the memory of their pages back every so many rows, so that it does not grow."""

    def __init__(self, rows: TokenRows) -> None:
        self._rows = rows
        self._read = 0

    def __call__(self, rows: Sequence[int | None]) -> MicroBatch:
        """Read rows."""
        self._read += len(rows)
        if self._read >= _FORGET_ROWS:
            self._read = 0
            self._rows.forget()
        return self._rows.read(rows)


class Batch:
    """The arrays of a MicroBatch while they are filled; a slot that is not filled is the empty row."""

    def __init__(self, rows: int, seq_len: int) -> None:
        self.seq_len = seq_len
        self.input_ids = np.zeros((rows, seq_len), np.int64)
        self.labels = np.full((rows, seq_len), IGNORED, np.int64)
        self.position_ids = np.empty((rows, seq_len), np.int64)
        self.is_token = np.zeros((rows, seq_len), np.bool_)
        self._places = np.arange(seq_len)
        self.position_ids[:] = self._places

    def fill(self, slot: int, tokens: Ints, labels: Ints, positions: Ints) -> None:
        """Put a row into a slot. `labels` has each trained token at its own place; it is predicted from the one before."""
        length = len(tokens)
        self.input_ids[slot, :length] = tokens
        self.labels[slot, : length - 1] = labels[1:]
        self.position_ids[slot, :length] = positions
        self.position_ids[slot, length:] = self._places[: self.seq_len - length]
        self.is_token[slot, :length] = True

    def finished(self) -> MicroBatch:
        """The arrays as tensors."""
        return MicroBatch(
            input_ids=torch.from_numpy(self.input_ids),
            labels=torch.from_numpy(self.labels),
            position_ids=torch.from_numpy(self.position_ids),
            is_token=torch.from_numpy(self.is_token),
        )


def write_rows(
    folder: Path,
    stores: Sequence[TokenStore],
    *,
    seq_len: int,
    packing: bool,
    overlong: Overlong,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, int]:
    """Plan the rows of documents and write the plan; memory does not grow with their number.

    Returns:
        Counts: `rows`, `tokens`, `targets`, `documents`, `overlong_documents`, `lost_tokens`, `untrained_documents` (that
        lost all their targets with the cut) and `untrained_pieces`.
    """
    counts: Counter[str] = Counter(rows=0)
    names = ("row_offsets", "documents", "starts", "lengths")
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{name}.bin", "wb", buffering=1 << 20)) for name in names]
        files[0].write(np.zeros(1, "<i8").data)
        num_segments = base = 0
        total = sum(store.num_documents for store in stores)
        for store in stores:
            for first in range(0, store.num_documents, PACKED_TOGETHER):
                documents = np.arange(first, min(first + PACKED_TOGETHER, store.num_documents))
                segments = _trained_segments(store, documents, seq_len, overlong, counts)
                rows = pack(segments, seq_len) if packing else one_row_each(segments)
                for file, values, dtype in zip(
                    files,
                    (
                        rows.offsets[1:] + num_segments,
                        rows.segments.document + base + first,
                        rows.segments.start,
                        rows.segments.length,
                    ),
                    ("<i8", "<i8", "<i4", "<i4"),
                    strict=True,
                ):
                    file.write(np.ascontiguousarray(values, dtype).data)
                num_segments += len(rows.segments.length)
                counts["rows"] += rows.num_rows
                progress(f"packing: {counts['documents']:,} of {total:,} samples")
                store.forget()
            base += store.num_documents
    return dict(counts)


def _trained_segments(store: Store, documents: Ints, seq_len: int, overlong: Overlong, counts: Counter[str]) -> Segments:
    """The segments of consecutive documents that have something to learn; the rest is counted."""
    lengths = store.lengths[documents].astype(np.int64)
    cut = cut_documents(lengths, seq_len, overlong)
    spans, span_counts = store.spans_of(documents)
    targets = count_targets(
        cut.segments,
        np.concatenate([[0], np.cumsum(lengths)]),
        spans,
        np.concatenate([[0], np.cumsum(span_counts)]),
    )
    segments = cut.segments.take(targets > 0)
    trained = np.zeros(len(documents), bool)
    trained[segments.document] = True
    dropped = int((lengths > seq_len).sum()) if overlong == "drop" else 0
    counts["documents"] += len(documents)
    counts["tokens"] += int(segments.length.sum())
    counts["targets"] += int(targets.sum())
    counts["overlong_documents"] += cut.overlong_documents
    counts["lost_tokens"] += cut.lost_tokens
    counts["untrained_documents"] += int((~trained).sum()) - dropped
    counts["untrained_pieces"] += int((targets == 0).sum())
    return segments


def fingerprint_of(pools: Sequence[Pool], weights: Sequence[float], parts: Any) -> str:
    """Tells this data from other data, by samples of its tokens and of their arrangement."""
    digest = hashlib.sha256(repr((parts, list(weights))).encode())
    for pool in pools:
        digest.update(pool.digest())
    return digest.hexdigest()[:16]
