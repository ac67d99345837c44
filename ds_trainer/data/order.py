"""The order of the run: which row is fed at which position, on which rank. Pure; positions and rows count from 0.

A position counts the rows the whole job has consumed, over all ranks, steps and epochs. It is the only state of the data:
the row at a position does not depend on the number of ranks or on the micro-batch size, so any job can go on from it.
"""

from __future__ import annotations

import hashlib
import struct
from fractions import Fraction
from functools import lru_cache
from math import ceil

_WORD = (1 << 64) - 1


def row_at(position: int, num_rows: int, seed: int) -> int:
    """The row fed at a position: each epoch is a permutation of all rows, another one each time.

    Needs neither memory nor the rows before it, and gives the same answer on every machine and for ever.

    Args:
        position: rows consumed before this one, over the whole run.
        num_rows: rows of the data, at least 1.
        seed: `train.seed`.
    """
    epoch, index = divmod(position, num_rows)
    return _permute(index, num_rows, _round_keys(seed, epoch))


def total_rows(num_rows: int, epochs: float) -> int:
    """Rows of a run of so many epochs; a part of a row counts as one. `epochs` is the decimal that was written."""
    return ceil(num_rows * Fraction(repr(epochs)))


def steps_for(total_rows: int, global_batch_size: int) -> int:
    """Optimizer steps that consume `total_rows` rows; the last one may be partial."""
    return -(-total_rows // global_batch_size)


def rows_of_window(
    first_position: int,
    *,
    num_rows: int,
    seed: int,
    total_rows: int | None,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    rank: int,
    data_parallel_size: int,
) -> list[list[int | None]]:
    """The rows one rank feeds in one optimizer step, a list for each micro-batch; see `positions_of_window`.

    `total_rows` is where the run ends: a position from there on is None, an empty row. With None the run does not end.
    """
    window = positions_of_window(
        first_position,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        rank=rank,
        data_parallel_size=data_parallel_size,
    )
    end = total_rows if total_rows is not None else window[-1][-1] + 1
    return [[row_at(position, num_rows, seed) if position < end else None for position in positions] for positions in window]


def positions_of_window(
    first_position: int,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    rank: int,
    data_parallel_size: int,
) -> list[list[int]]:
    """The positions one rank feeds in one optimizer step, a list for each micro-batch.

    All ranks together feed the global_batch_size positions from `first_position` on, each once, however those are divided.

    Args:
        first_position: rows consumed before the step; step x global_batch_size if that never changed.
        micro_batch_size: rows per rank per forward.
        gradient_accumulation_steps: forwards per rank per optimizer step.
        rank: 0 <= rank < data_parallel_size.
        data_parallel_size: ranks that see different rows.
    """
    starts = (
        first_position + (micro_step * data_parallel_size + rank) * micro_batch_size
        for micro_step in range(gradient_accumulation_steps)
    )
    return [list(range(start, start + micro_batch_size)) for start in starts]


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"row order 1, seed {seed}, epoch {epoch}".encode(), digest_size=64).digest()
    return struct.unpack("<8Q", digest)


def _permute(index: int, size: int, keys: tuple[int, ...]) -> int:
    """A permutation of range(size): a Feistel network on an even number of bits, walked until it lands in the range.

    Source: Black and Rogaway, Ciphers with arbitrary finite domains (2002), method 3 (cycle walking).
    """
    half = max(3, ((size - 1).bit_length() + 1) // 2)  # very few bits would mix badly
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(word: int) -> int:
    """Splitmix64's finalizer: every bit of the word changes half of the result's."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)
