"""From the lengths of documents to rows: cut what is too long, then fill rows with little padding. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Overlong = Literal["truncate", "split", "drop"]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segments:
    """Parts of documents that are fed in one piece. Three int64 arrays of one length; start and length in tokens."""

    document: Ints
    start: Ints
    length: Ints

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Segments:
        """The segments at these indices, or where the mask is true."""
        return Segments(self.document[which], self.start[which], self.length[which])


@dataclass(frozen=True, slots=True)
class Cut:
    """What `cut_documents` made of the documents, and what that cost."""

    segments: Segments
    overlong_documents: int
    """Documents longer than seq_len: all of them truncated, split or dropped."""
    lost_tokens: int
    """Tokens that are in no segment."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Which segments lie in which row, one after another."""

    offsets: Ints
    """(num_rows + 1): row r holds segments offsets[r] to offsets[r + 1]."""
    segments: Segments

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.offsets) - 1


def cut_documents(lengths: Ints, seq_len: int, overlong: Overlong) -> Cut:
    """Cut documents into segments of at most `seq_len` tokens, in document order. Empty documents give none.

    Args:
        lengths: tokens of each document, (num_documents,).
        seq_len: positions in a row.
        overlong: `truncate` keeps the first seq_len tokens of a longer document, `split` all of it in several segments,
            `drop` nothing.
    """
    too_long = lengths > seq_len
    if overlong == "split":
        pieces = -(-lengths // seq_len)
    else:
        pieces = np.where(too_long & (overlong == "drop") | (lengths == 0), 0, 1)
    document = np.repeat(np.arange(len(lengths)), pieces)
    first_piece = np.cumsum(pieces) - pieces
    start = (np.arange(len(document)) - first_piece[document]) * seq_len
    length = np.minimum(lengths[document] - start, seq_len)
    return Cut(
        segments=Segments(document, start, length),
        overlong_documents=int(too_long.sum()),
        lost_tokens=int(lengths.sum() - length.sum()),
    )


def one_row_each(segments: Segments, together: int = 1) -> Rows:
    """Rows without packing: a segment each, or as many as belong together, in mixed order."""
    order = _mixed(len(segments.length) // together)
    return Rows(np.arange(len(order) + 1) * together, segments.take(_members(order, together)))


def pack(segments: Segments, seq_len: int, together: int = 1) -> Rows:
    """Pack segments into rows by best-fit decreasing: the longest first, each into the fullest row that can take it.

    Segments of equal length are placed together, so the cost grows with the number of distinct lengths more than with that
    of segments.

    Args:
        segments: none longer than seq_len.
        seq_len: positions in a row.
        together: so many consecutive segments are placed as one item; their sum is not longer than seq_len.

    Returns:
        Rows in mixed order: the first rows are no longer or shorter than the others. Within a row, document order.
    """
    row_of = best_fit_decreasing(segments.length.reshape(-1, together).sum(axis=1), seq_len)
    num_rows = int(row_of.max(initial=-1)) + 1
    row_of = _mixed(num_rows)[row_of]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return Rows(offsets * together, segments.take(_members(_stable_order(row_of, num_rows), together)))


def _members(groups: Ints, together: int) -> Ints:
    """The segments of groups, in the order of the groups."""
    return (groups[:, None] * together + np.arange(together)).ravel()


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The row of each item, numbered from 0 in the order the rows were opened.

    Args:
        lengths: of each item, 1 <= length <= capacity.
        capacity: of a row.
    """
    order = _stable_order(capacity - lengths, capacity)
    of_length = np.bincount(lengths, minlength=1)
    distinct = np.flatnonzero(of_length)[::-1]
    row_of = np.empty(len(lengths), np.int64)
    rows_with: list[list[Ints]] = [[] for _ in range(capacity + 1)]  # by what is left in them
    available = 0  # bit r is set if some row has r left: finds the best fit in one operation
    num_rows = done = 0
    for length, count in zip(distinct.tolist(), of_length[distinct].tolist(), strict=True):
        group_end = done + count
        while done < group_end:
            waiting = group_end - done
            fitting = available >> length
            if fitting:
                left = length + (fitting & -fitting).bit_length() - 1
                rows = rows_with[left].pop()
                if not rows_with[left]:
                    available ^= 1 << left
            else:
                left = capacity
                rows = np.arange(num_rows, num_rows - (-waiting // (capacity // length)))
                num_rows = int(rows[-1]) + 1
            # What a row has left after one item is an even better fit, so the next item of the group goes there too.
            per_row = left // length
            full, rest = divmod(min(waiting, per_row * len(rows)), per_row)
            placed = full * per_row + rest
            row_of[order[done : done + placed]] = np.repeat(rows, per_row)[:placed]
            done += placed
            partly = rows[full : full + 1] if rest else rows[:0]
            untouched = rows[full + len(partly) :]
            for some, remaining in (
                (rows[:full], left - per_row * length),
                (partly, left - rest * length),
                (untouched, left),
            ):
                if len(some) and remaining:
                    rows_with[remaining].append(some)
                    available |= 1 << remaining
    return row_of


def _stable_order(values: Ints, limit: int) -> NDArray[np.intp]:
    """What a stable argsort gives, for whole numbers 0 <= value < limit.

    numpy sorts 16-bit numbers by their digits, several times faster than wider ones, so those are sorted 16 bits at a time.
    """
    order = np.argsort(values.astype(np.uint16), kind="stable")
    for bits in range(16, (max(limit, 1) - 1).bit_length(), 16):
        order = order[np.argsort((values[order] >> bits).astype(np.uint16), kind="stable")]
    return order


def _mixed(count: int) -> Ints:
    """A fixed permutation of range(count) without visible order; the same on every machine and for ever.

    Source: splitmix64, Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014).
    """
    bits = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(bits ^ (bits >> np.uint64(31)), kind="stable")
