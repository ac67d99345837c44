"""What glibc's heap grows to under a row of allocations: freed blocks leave holes that not every request fits into. Pure."""

from __future__ import annotations

import bisect

_HEADER, _UNIT = 16, 16
_ALIGNED_MORE = 64 + 32
"""A request aligned to 64 bytes, as all of torch's, looks for a hole so much larger than itself (the alignment and the smallest
chunk), so that the hole an equal one left is too small for it. Source: glibc 2.36, malloc/malloc.c, `_int_memalign`; bug 14581,
mended in 2.38; torch 2.13, c10/core/alignment.h, gAlignment."""
_TAKEN = 2
"""Of so many blocks, one has a splinter before it that never becomes part of a hole again. Aligning cuts up to 80 bytes off in
front; they go to the thread's cache of small chunks (tcache), which are not joined with their neighbours, and from there to
whatever small object is made next. Measured, not derived: scripts/bench/heap_growth.py."""


class Heap:
    """Best fit over one growing stretch of addresses.

    Holes are joined with their neighbours, but not across a splinter that was taken; the topmost is given back.
    """

    def __init__(self) -> None:
        self._holes: list[tuple[int, int]] = []
        """(address, size), by address."""
        self._used: dict[int, tuple[int, int]] = {}
        self._taken: set[int] = set()
        """Addresses with such a splinter before them."""
        self._blocks = 0
        self._top = 0
        self.peak = 0
        """The most it ever took."""

    def allocate(self, key: int, size: int) -> None:
        """Find a place for a block."""
        size = -(-size // _UNIT) * _UNIT + _HEADER
        fitting = [index for index, hole in enumerate(self._holes) if hole[1] >= size + _ALIGNED_MORE]
        if not fitting:
            address, self._top = self._top, self._top + size
            self.peak = max(self.peak, self._top)
        else:
            index = min(fitting, key=lambda each: self._holes[each][1])
            address, hole = self._holes[index]
            self._holes[index] = (address + size, hole - size)
        self._used[key] = (address, size)
        self._blocks += 1
        if self._blocks % _TAKEN == 0:
            self._taken.add(address)

    def free(self, key: int) -> None:
        """Give a block back."""
        address, size = self._used.pop(key)
        index = bisect.bisect(self._holes, (address, 0))
        if index < len(self._holes) and self._holes[index][0] == address + size not in self._taken:
            size += self._holes.pop(index)[1]
        if index and sum(self._holes[index - 1]) == address not in self._taken:
            index -= 1
            address, before = self._holes.pop(index)
            size += before
        if address + size == self._top:
            self._top = address
        else:
            self._holes.insert(index, (address, size))
