"""The order of the run: which row is fed at which position, on which rank. Pure; positions and rows count from 0.

A position counts the rows the whole job has consumed, over all ranks, steps and epochs. It is the only state of the data:
the row at a position does not depend on the number of ranks or on the micro-batch size, so any job can go on from it.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, gcd, lcm

MAX_PERIOD = 100_000
"""Longest period of a mixture; weights that need a longer one are rounded to it, each by less than 1e-5 of the rows."""
LONGEST_WORK = 1_000_000
"""Period times sources: the work of laying out the turns, about a second. Above ten sources the period is shorter."""
_WORD = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Which row is fed at which position of a run. Rows are numbered through all pools of rows, one after another.

    Without weights there is one pool. With weights each source is a pool of its own: the sources take turns, and each goes
    through its rows in epochs of its own.
    """

    num_rows: tuple[int, ...]
    """Rows of each pool, each at least 1."""
    weights: tuple[float, ...] = ()
    """Of each pool; empty for one pool. They need not add up to 1."""
    seed: int
    """`train.seed`."""
    total_rows: int | None
    """Where the run ends; None if it does not end with the data."""

    def row_at(self, position: int) -> int | None:
        """The row fed at a position; None, an empty row, from the end of the run on."""
        if self.total_rows is not None and position >= self.total_rows:
            return None
        if not self.weights:
            return row_at(position, self.num_rows[0], self.seed)
        pool, index = turn_at(position, self.weights)
        return sum(self.num_rows[:pool]) + row_at(index, self.num_rows[pool], self.seed, pool)


def passes(positions: int, num_rows: Sequence[int], weights: tuple[float, ...]) -> list[float]:
    """How many epochs of each pool so many positions of a mixture are."""
    sources, _, counts = _turns(weights)
    periods, rest = divmod(positions, len(sources))
    fed = [periods * count for count in counts]
    for source in sources[:rest]:
        fed[source] += 1
    return [each / rows for each, rows in zip(fed, num_rows, strict=True)]


def turn_at(position: int, weights: tuple[float, ...]) -> tuple[int, int]:
    """Which source a position belongs to, and how many earlier positions belong to the same source.

    In any prefix, a source has had its share of the positions to within one.
    """
    sources, earlier, counts = _turns(weights)
    period, index = divmod(position, len(sources))
    source = sources[index]
    return source, period * counts[source] + earlier[index]


def row_at(position: int, num_rows: int, seed: int, pool: int = 0) -> int:
    """The row of a pool fed at a position of it: each epoch is a permutation of all rows, another one each time.

    Needs neither memory nor the rows before it, and gives the same answer on every machine and for ever.

    Args:
        position: rows of the pool consumed before this one, over the whole run.
        num_rows: rows of the pool, at least 1.
        seed: `train.seed`.
        pool: pools of one size go through their rows in different orders.
    """
    epoch, index = divmod(position, num_rows)
    return _permute(index, num_rows, _round_keys(seed, epoch, pool))


def total_rows(num_rows: int, epochs: float) -> int:
    """Rows of a run of so many epochs; a part of a row counts as one. `epochs` is the decimal that was written."""
    return ceil(num_rows * Fraction(repr(epochs)))


def steps_for(total_rows: int, global_batch_size: int) -> int:
    """Optimizer steps that consume `total_rows` rows; the last one may be partial."""
    return -(-total_rows // global_batch_size)


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


@lru_cache(maxsize=1)
def _turns(weights: tuple[float, ...]) -> tuple[Sequence[int], Sequence[int], list[int]]:
    """One period of a mixture: the source of each position, how many positions it had before, and how many it has in all.

    Of the sources that may have the next position without running ahead, the one whose turn is due first has it: then no
    source is ever more than 1 - 1 / (2 n - 2) positions from its share.

    Source: Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
    """
    shares = _integer_shares(weights)
    period, slack = sum(shares), 2 * len(shares) - 2
    counts = [0] * len(shares)
    behind = [0] * len(shares)  # times `period`, to stay whole
    sources, earlier = array("H"), array("i")
    for _ in range(period):
        chosen, due = 0, None
        for source, share in enumerate(shares):
            behind[source] += share
            if slack * behind[source] >= period or slack == 0:
                # Due after ((1 - 1 / slack) - behind / period) / (share / period); compared without dividing.
                when = (slack - 1) * period - slack * behind[source]
                if due is None or when * shares[chosen] < due * share:
                    chosen, due = source, when
        sources.append(chosen)
        earlier.append(counts[chosen])
        counts[chosen] += 1
        behind[chosen] -= period
    return sources, earlier, counts


def _integer_shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights, which are taken as the decimals that were written."""
    exact = [Fraction(repr(weight)) for weight in weights]
    whole = lcm(*(each.denominator for each in exact))
    shares = [int(each * whole) for each in exact]
    shares = [share // gcd(*shares) for share in shares]
    longest = min(MAX_PERIOD, LONGEST_WORK // len(shares))
    if sum(shares) <= longest:
        return shares
    # Largest remainders; no source may vanish.
    quotas = [Fraction(share, sum(shares)) * longest for share in shares]
    rounded = [max(1, int(quota)) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda source: int(quotas[source]) - quotas[source])
    for source in by_remainder[: max(0, longest - sum(rounded))]:
        rounded[source] += 1
    return rounded


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int, pool: int) -> tuple[int, ...]:
    name = f"row order 1, seed {seed}, epoch {epoch}" + (f", pool {pool}" if pool else "")
    return struct.unpack("<8Q", hashlib.blake2b(name.encode(), digest_size=64).digest())


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
