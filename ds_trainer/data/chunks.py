"""What flows from the reader through the tokenising workers to the store: chunks of records, and chunks of tokens.

One process reads files into chunks, which costs little; any number of workers parse, render and tokenise them, which costs
much; one process writes the results in the order of the chunks. Where one chunk ends and the next begins depends on the files
alone, so that work which was killed can be taken up at the chunk it had reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = Mapping[str, Any]
"""One object of a file: whatever JSON, Parquet or CSV can hold."""


class BadRecordError(ValueError):
    """A record that cannot be trained on. The text says what was found, the rule and the fix; the caller knows where."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason
        """A few words by which records are counted, such as `invalid JSON`; they name no record and no value."""


MARGIN_COUNT = "records with a margin"
"""What they are called among the counts of a chunk, and of a store."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A bad record, and where it stands. Picklable."""

    path: str
    line: int
    """Line of a text file, or row of a columnar one, from 1; 0 if the file as a whole is bad."""
    reason: str
    what: str

    @property
    def where(self) -> str:
        """`path:line`, or the path alone."""
        return f"{self.path}:{self.line}" if self.line else self.path

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of one file. Picklable.

    `content` is what the reader can tell at little cost: whole lines of a JSON-lines file as they stand (bytes), a
    `pyarrow.RecordBatch`, or records with their line numbers.
    """

    path: str
    first: int
    """Number of the first line or row, from 1."""
    content: bytes | list[tuple[int, Record]] | Any
    is_last: bool = False
    """Whether the file ends with this chunk."""
    bad: tuple[BadRecord, ...] = ()
    """What the reader itself found: a line that is too long, a file that is not what its name says."""
    done: float = 0.0
    """How much of the file has been read with this chunk, 0 to 1."""


@dataclass(frozen=True, slots=True)
class TokenizedChunk:
    """The documents of a chunk, end to end. Picklable; a few large arrays, so that handing it over is cheap."""

    tokens: NDArray[np.uint16] | NDArray[np.int32]
    """(num_tokens,)."""
    lengths: NDArray[np.int32]
    """Tokens of each document, (num_documents,)."""
    spans: NDArray[np.int32] | None
    """Trained token positions relative to their document, first and one after the last: (num_spans, 2), sorted and disjoint
    in each document. None: every token is trained."""
    span_counts: NDArray[np.int32] | None
    """Spans of each document, (num_documents,); None where `spans` is."""
    lines: NDArray[np.int64]
    """Line or row each document stands on, (num_documents,)."""
    read: int
    """Records read, bad ones included, blank lines not."""
    bad: tuple[BadRecord, ...]
    """In the order of their lines."""
    kinds: NDArray[np.int8] | None = None
    """Of each document, as protocols names them; None: all are 0."""
    margins: NDArray[np.float64] | None = None
    """Of each document: that of its pair at the chosen one, 0 at the other; None where there are no pairs of rewards."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What else is worth telling: `blank lines`, `records with text like a control token`, ..."""

    def head(self, documents: int, together: int = 1) -> TokenizedChunk:
        """The first documents alone (at least one), and what was read up to the last of them.

        Args:
            documents: how many.
            together: documents of a record; a divisor of their number.
        """
        spans, span_counts = self.spans, self.span_counts
        if spans is not None and span_counts is not None:
            span_counts = span_counts[:documents]
            spans = spans[: int(span_counts.sum())]
        bad = tuple(each for each in self.bad if each.line <= self.lines[documents - 1])
        return TokenizedChunk(
            tokens=self.tokens[: int(self.lengths[:documents].sum())],
            lengths=self.lengths[:documents],
            spans=spans,
            span_counts=span_counts,
            lines=self.lines[:documents],
            read=documents // together + len(bad),
            bad=bad,
            kinds=None if self.kinds is None else self.kinds[:documents],
            margins=None if self.margins is None else self.margins[:documents],
            counts=self.counts,
        )
