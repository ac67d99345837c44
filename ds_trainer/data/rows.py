"""Rows of tokens: planned once over the stores of the documents, written down, and read in any order.

The plan has all that a row needs in the order it is needed, so that reading one is a few positioned reads. They are not
memory maps: a page that is touched in a map counts as this process's memory, by the megabyte on some kernels, and a disk that
fails kills the process instead of raising an error.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ds_trainer.data.chunks import TokenizedChunk
from ds_trainer.data.pack import Overlong, Rows, Segments, cut_documents, one_row_each, pack
from ds_trainer.data.store import ChunkStore, RandomFile, Store, TokenStore
from ds_trainer.protocols import IGNORED, MicroBatch

Ints = NDArray[np.int64]

PACKED_TOGETHER = 1 << 20
"""Documents that are packed together: enough to fill rows, few enough to be held in memory."""
SEGMENT = np.dtype([("token", "<i8"), ("document", "<i8"), ("length", "<i4"), ("store", "<i4")])
"""Its first token in the store, its document there, its tokens, and which store of the pool; from bit 16 on of that number the
document's kind, which is 0 but for labelled answers."""
SPAN = np.dtype([("begin", "<i4"), ("end", "<i4")])
"""Trained tokens, by their place in the row; the first of a segment is never among them."""
_FILES = ("rows.bin", "segments.bin", "spans.bin")
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_KIND, _STORE = 16, (1 << 16) - 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What lies in each row."""

    borders: Ints
    """(num_rows + 1, 2): where the segments and the spans of each row begin; they end where those of the next begin."""
    segments: NDArray[Any]
    """Of SEGMENT."""
    spans: NDArray[Any]
    """Of SPAN."""


class Pool:
    """Documents that are packed and mixed together, and the plan of their rows, in files."""

    def __init__(self, stores: Sequence[TokenStore], rows_folder: Path) -> None:
        self.stores = tuple(stores)
        self.meta: dict[str, Any] = json.loads((rows_folder / "meta.json").read_text(encoding="utf-8"))
        """What `write_rows` counted."""
        self._borders, self._segments, self._spans = (RandomFile(rows_folder / name) for name in _FILES)

    @property
    def num_rows(self) -> int:
        """How many rows there are, at least 1."""
        return self._borders.size // 16 - 1

    def segments(self, row: int) -> list[tuple[int, int, int, int]]:
        """The segments of a row, as SEGMENT has them."""
        return self._plan_of(row)[0]

    def read(self, row: int, slot: int, batch: Batch) -> None:
        """Copy a row into a slot of a batch."""
        segments, spans = self._plan_of(row)
        batch.fill(slot, segments, spans, self.stores)

    def digest(self) -> bytes:
        """Changes with the tokens and with their arrangement; takes milliseconds."""
        digest = hashlib.sha256()
        numbers = [file for store in self.stores for _, file in sorted(store.numbers.items())]
        for file in (self._borders, self._segments, self._spans, *(store.file for store in self.stores), *numbers):
            digest.update(f"{file.size} ".encode())
            for start in np.linspace(0, max(0, file.size - _SAMPLE_BYTES), num=_SAMPLES, dtype=np.int64).tolist():
                digest.update(file.read(start, min(_SAMPLE_BYTES, file.size)))
        return digest.digest()

    def _plan_of(self, row: int) -> tuple[list[Any], list[Any]]:
        first, first_span, end, end_span = np.frombuffer(self._borders.read(16 * row, 32), "<i8").tolist()
        segments = self._segments.read(SEGMENT.itemsize * first, SEGMENT.itemsize * (end - first))
        spans = self._spans.read(SPAN.itemsize * first_span, SPAN.itemsize * (end_span - first_span))
        return np.frombuffer(segments, SEGMENT).tolist(), np.frombuffer(spans, SPAN).tolist()


class Block:
    """Chunks of a stream, cut and arranged in memory."""

    def __init__(
        self, chunks: Sequence[TokenizedChunk], *, seq_len: int, overlong: Overlong, arrange: Callable[[Segments, int], Rows]
    ) -> None:
        self._store = ChunkStore(chunks)
        segments = _trained_segments(self._store, np.arange(self._store.num_documents), seq_len, overlong, Counter())
        self._plan = lay_out(self._store, arrange(segments, seq_len), store_number=0)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self._plan.borders) - 1

    def read(self, row: int, slot: int, batch: Batch) -> None:
        """Copy a row into a slot of a batch."""
        (first, first_span), (end, end_span) = self._plan.borders[row : row + 2].tolist()
        segments = self._plan.segments[first:end].tolist()
        batch.fill(slot, segments, self._plan.spans[first_span:end_span].tolist(), (self._store,))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRows:
    """The data of a run, or what it is evaluated on. Everything stays in files: a rank holds only the rows it reads.

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

        Raises:
            DataError: a file of the cache cannot be read, or was cut.
        """
        batch = Batch(len(rows), self.seq_len, {name for store in self.stores for name in store.numbers})
        for slot, row in enumerate(rows):
            if row is not None:
                pool, own = self._place(row)
                pool.read(own, slot, batch)
        return batch.finished()

    @property
    def stores(self) -> list[TokenStore]:
        """The stores of all pools; one may be in several."""
        return [store for pool in self.pools for store in pool.stores]

    def samples(self, row: int) -> list[tuple[TokenStore, int]]:
        """The store and the number of each document in a row, in the order of the row."""
        pool, own = self._place(row)
        return [(pool.stores[store & _STORE], document) for _, document, _, store in pool.segments(own)]

    def _place(self, row: int) -> tuple[Pool, int]:
        for pool in self.pools:
            if row < pool.num_rows:
                return pool, row
            row -= pool.num_rows
        raise IndexError(row)


class Batch:
    """The arrays of a MicroBatch while they are filled; a slot that is not filled is the empty row."""

    def __init__(self, rows: int, seq_len: int, numbers: Collection[str] = ()) -> None:
        self.input_ids = np.zeros((rows, seq_len), np.int64)
        self.labels = np.full((rows, seq_len), IGNORED, np.int64)
        self._places = _places(seq_len)
        self.position_ids = self._places[None].repeat(rows, axis=0)
        self.is_token = np.zeros((rows, seq_len), np.bool_)
        self._kinds: list[int] = []
        self._numbers: dict[str, list[bytes]] = {name: [] for name in numbers}

    def fill(
        self,
        slot: int,
        segments: Sequence[tuple[int, int, int, int]],
        spans: Sequence[tuple[int, int]],
        stores: Sequence[Store],
    ) -> None:
        """Put a row into a slot: segments and spans as SEGMENT and SPAN have them, and where the tokens are."""
        ids, labels, positions = self.input_ids[slot], self.labels[slot], self.position_ids[slot]
        tokens = np.empty(len(ids), stores[0].dtype)
        at = 0
        for token, document, length, store in segments:
            end = at + length
            for name, found in self._numbers.items():
                known = stores[store & _STORE].numbers.get(name)
                found.append(known.read(8 * document, 8) if known else bytes(8))
            stores[store & _STORE].copy_tokens(token, tokens[at:end])
            self._kinds.append(store >> _KIND)
            positions[at:end] = self._places[:length]
            at = end
        ids[:at] = tokens[:at]
        positions[at:] = self._places[: len(ids) - at]
        self.is_token[slot, :at] = True
        for begin, end in spans:
            labels[begin - 1 : end - 1] = ids[begin:end]

    def finished(self) -> MicroBatch:
        """The arrays as tensors."""
        return MicroBatch(
            input_ids=torch.from_numpy(self.input_ids),
            labels=torch.from_numpy(self.labels),
            position_ids=torch.from_numpy(self.position_ids),
            is_token=torch.from_numpy(self.is_token),
            kinds=torch.tensor(self._kinds) if any(self._kinds) else None,
            numbers={
                name: torch.from_numpy(np.frombuffer(b"".join(found), "<f8").copy()) for name, found in self._numbers.items()
            },
        )


@lru_cache(maxsize=2)
def _places(seq_len: int) -> Ints:
    return np.arange(seq_len)


def lay_out(store: Store, rows: Rows, *, store_number: int) -> Plan:
    """Write out what lies in each row, so that nothing has to be looked up when it is read."""
    segments, counts = rows.segments, np.diff(rows.offsets)
    laid = np.empty(len(segments.length), SEGMENT)
    laid["token"] = store.first_tokens(segments.document) + segments.start
    laid["document"], laid["length"], laid["store"] = segments.document, segments.length, store_number
    if store.kinds is not None:
        laid["store"] |= store.kinds[segments.document].astype(np.int32) << _KIND
    begins = np.cumsum(segments.length) - segments.length
    in_row = begins - np.repeat(begins[rows.offsets[:-1]], counts) if len(begins) else begins
    low, high, segment = _trained_spans(store, segments)
    spans = np.empty(len(segment), SPAN)
    spans["begin"], spans["end"] = in_row[segment] + low, in_row[segment] + high
    spans_before = np.concatenate([[0], np.cumsum(np.bincount(segment, minlength=len(laid)))])
    return Plan(np.stack([rows.offsets, spans_before[rows.offsets]], axis=1), laid, spans)


def write_rows(
    folder: Path,
    stores: Sequence[TokenStore],
    *,
    seq_len: int,
    packing: bool,
    overlong: Overlong,
    together: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, int]:
    """Plan the rows of documents and write the plan; memory does not grow with their number.

    Args:
        folder: takes the plan.
        stores: of the documents.
        seq_len: positions in a row.
        packing: several samples a row.
        overlong: what happens to a longer sample.
        together: documents of a sample, which lie in one row, one after the other; more than 1 with `drop` only.
        progress: takes a line about the work.

    Returns:
        Counts: `rows`, `tokens`, `targets`, `documents` (samples), `overlong_documents`, `lost_tokens`, `untrained_documents`
        (that lost all their targets with the cut) and `untrained_pieces`.
    """
    counts: Counter[str] = Counter(rows=0)
    done = np.zeros(2, np.int64)
    total = sum(store.num_documents for store in stores)
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / name, "wb", buffering=1 << 20)) for name in _FILES]
        files[0].write(done.astype("<i8").data)
        for number, store in enumerate(stores):
            for first in range(0, store.num_documents, PACKED_TOGETHER):
                documents = np.arange(first, min(first + PACKED_TOGETHER, store.num_documents))
                if together == 1:
                    segments = _trained_segments(store, documents, seq_len, overlong, counts)
                else:
                    segments = _fitting_groups(store, documents, seq_len, together, counts)
                rows = pack(segments, seq_len, together) if packing else one_row_each(segments, together)
                plan = lay_out(store, rows, store_number=number)
                for file, values in zip(files, (plan.borders[1:] + done, plan.segments, plan.spans), strict=True):
                    file.write(np.ascontiguousarray(values).data)
                done += plan.borders[-1]
                counts["rows"] += rows.num_rows
                progress(f"packing: {counts['documents']:,} of {total:,} samples")
                store.forget()
    return dict(counts)


def _trained_segments(store: Store, documents: Ints, seq_len: int, overlong: Overlong, counts: Counter[str]) -> Segments:
    """The segments of consecutive documents that have something to learn; the rest is counted."""
    lengths = store.lengths[documents].astype(np.int64)
    cut = cut_documents(lengths, seq_len, overlong)
    first = int(documents[0]) if len(documents) else 0
    segments = Segments(cut.segments.document + first, cut.segments.start, cut.segments.length)
    low, high, segment = _trained_spans(store, segments)
    targets = np.bincount(segment, weights=high - low, minlength=len(segments.length))
    kept = segments.take(targets > 0)
    trained = len(np.unique(kept.document))
    dropped = int((lengths > seq_len).sum()) if overlong == "drop" else 0
    counts["documents"] += len(documents)
    counts["tokens"] += int(kept.length.sum())
    counts["targets"] += int(targets.sum())
    counts["overlong_documents"] += cut.overlong_documents
    counts["lost_tokens"] += cut.lost_tokens
    counts["untrained_documents"] += len(documents) - trained - dropped
    counts["untrained_pieces"] += int((targets == 0).sum())
    return kept


def _fitting_groups(store: Store, documents: Ints, seq_len: int, together: int, counts: Counter[str]) -> Segments:
    """The segments of consecutive groups of documents: a group that is longer than a row, or of which a document has nothing
    to learn, is left out as a whole.
    """
    lengths = store.lengths[documents].astype(np.int64)
    whole = Segments(documents, np.zeros_like(lengths), lengths)
    low, high, segment = _trained_spans(store, whole)
    targets = np.bincount(segment, weights=high - low, minlength=len(lengths))
    fits = lengths.reshape(-1, together).sum(axis=1) <= seq_len
    trained = (targets.reshape(-1, together) > 0).all(axis=1)
    kept = np.repeat(fits & trained, together)
    counts["documents"] += len(fits)
    counts["tokens"] += int(lengths[kept].sum())
    counts["targets"] += int(targets[kept].sum())
    counts["overlong_documents"] += int((~fits).sum())
    counts["lost_tokens"] += int(lengths[np.repeat(~fits, together)].sum())
    counts["untrained_documents"] += int((fits & ~trained).sum())
    counts["untrained_pieces"] += int((targets == 0).sum())
    return whole.take(kept)


def _trained_spans(store: Store, segments: Segments) -> tuple[Ints, Ints, Ints]:
    """The trained spans of segments that hold a target: first token and the one after the last, relative to the segment; and
    the segment each belongs to.
    """
    spans, counts = store.spans_of(segments.document)
    segment = np.repeat(np.arange(len(counts)), counts)
    low = np.maximum(spans[:, 0] - segments.start[segment], 1)  # the first token has nothing to be predicted from
    high = np.minimum(spans[:, 1] - segments.start[segment], segments.length[segment])
    filled = low < high
    return low[filled], high[filled], segment[filled]


def fingerprint_of(pools: Sequence[Pool], weights: Sequence[float], parts: Any) -> str:
    """Tells this data from other data, by samples of its tokens and of their arrangement."""
    digest = hashlib.sha256(repr((parts, list(weights))).encode())
    for pool in pools:
        digest.update(pool.digest())
    return digest.hexdigest()[:16]
