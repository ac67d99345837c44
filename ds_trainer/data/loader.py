"""From rows to the micro-batches a rank feeds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ds_trainer.data.cache import Tokens
from ds_trainer.data.order import positions_of_window, rows_of_window
from ds_trainer.data.pack import Ints, Rows
from ds_trainer.protocols import IGNORED, MicroBatch

_SAMPLES, _SAMPLE = 64, 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row, as the arrays of MicroBatch: int64, (seq_len,)."""

    input_ids: Ints
    labels: Ints
    position_ids: Ints
    num_tokens: int
    """Positions that hold a token; they come first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRows:
    """The data of a run, or what it is evaluated on. Everything is memory-mapped: a rank holds only the rows it reads."""

    tokens: Tokens
    plan: Rows
    """Which parts of which documents lie in which row."""
    seq_len: int
    """Positions in a row, padding included."""
    num_tokens: int
    """Tokens of all rows, without padding."""
    num_targets: int
    """Labels of all rows that are not IGNORED."""
    max_token_id: int
    """The largest id in the data: the model's vocabulary must be larger."""

    def fingerprint(self) -> str:
        """Tells this data from other data, by samples of its tokens and of their arrangement; takes milliseconds."""
        digest = hashlib.sha256()
        tokens, plan = self.tokens, self.plan
        for array in (tokens.tokens, tokens.offsets, tokens.spans, plan.offsets, plan.segments.document):
            digest.update(f"{len(array)} ".encode())
            for start in np.linspace(0, max(0, len(array) - _SAMPLE), num=_SAMPLES, dtype=np.int64):
                digest.update(array[start : start + _SAMPLE].tobytes())
        return digest.hexdigest()[:16]

    @property
    def num_rows(self) -> int:
        """How many rows there are, at least 1."""
        return self.plan.num_rows

    def row(self, index: int | None) -> Row:
        """Read one row; None is the empty row, all padding.

        A label is the next token of the same segment if that one is trained. Positions restart with each segment, and with
        the padded tail.
        """
        input_ids = np.zeros(self.seq_len, np.int64)
        labels = np.full(self.seq_len, IGNORED, np.int64)
        position_ids = np.empty(self.seq_len, np.int64)
        tokens, segments = self.tokens, self.plan.segments
        at = 0
        segment_range = range(0) if index is None else range(self.plan.offsets[index], self.plan.offsets[index + 1])
        for segment in segment_range:
            document, start, length = (int(array[segment]) for array in (segments.document, segments.start, segments.length))
            first = int(tokens.offsets[document]) + start
            input_ids[at : at + length] = tokens.tokens[first : first + length]
            position_ids[at : at + length] = np.arange(length)
            spans = tokens.spans[tokens.span_offsets[document] : tokens.span_offsets[document + 1]]
            for span_start, span_end in (spans - start).tolist():
                low, high = max(span_start, 1), min(span_end, length)
                if low < high:
                    labels[at + low - 1 : at + high - 1] = input_ids[at + low : at + high]
            at += length
        position_ids[at:] = np.arange(self.seq_len - at)
        return Row(input_ids, labels, position_ids, at)


def windows(
    rows: TokenRows,
    *,
    first_position: int,
    total_rows: int | None,
    seed: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    rank: int,
    data_parallel_size: int,
) -> Iterator[list[MicroBatch]]:
    """The windows of one rank, a list of gradient_accumulation_steps micro-batches for each optimizer step.

    Args:
        rows: the data; the same on every rank.
        first_position: rows the whole job has consumed; 0, or what a checkpoint says.
        total_rows: where the run ends: `order.total_rows`. The last window is filled up with empty rows, so that all ranks
            end at the same step. None: it does not end.
        seed: `train.seed`.
        micro_batch_size: rows per rank per forward.
        gradient_accumulation_steps: forwards per rank per optimizer step.
        rank: 0 <= rank < data_parallel_size.
        data_parallel_size: ranks that see different rows.
    """
    global_batch_size = micro_batch_size * gradient_accumulation_steps * data_parallel_size
    position = first_position
    while total_rows is None or position < total_rows:
        window = rows_of_window(
            position,
            num_rows=rows.num_rows,
            seed=seed,
            total_rows=total_rows,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            rank=rank,
            data_parallel_size=data_parallel_size,
        )
        yield [_micro_batch(rows, indices) for indices in window]
        position += global_batch_size


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
        yield _micro_batch(rows, [position if position < count else None for position in positions])


def _micro_batch(rows: TokenRows, indices: Sequence[int | None]) -> MicroBatch:
    read = [rows.row(index) for index in indices]
    return MicroBatch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in read])),
        labels=torch.from_numpy(np.stack([row.labels for row in read])),
        position_ids=torch.from_numpy(np.stack([row.position_ids for row in read])),
        is_token=torch.from_numpy(np.stack([np.arange(rows.seq_len) < row.num_tokens for row in read])),
    )
