"""Tokenised documents in flat files.

`tokens.bin` and `tokens.idx` are laid out as Megatron-LM's indexed data sets, so that an existing corpus can be brought and
ours taken away. Beside them lies what Megatron does not have: which tokens are trained, and the line each document stands on.

Source: the layout of Megatron-LM, megatron/core/datasets/indexed_dataset.py (magic, version 1, type code, number of
sequences, number of document marks, int32 lengths, int64 byte positions, int64 marks; all little-endian).
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ds_trainer.data.chunks import MARGIN_COUNT, TokenizedChunk
from ds_trainer.errors import DataError

Ints = NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_CODES = {name: code for code, name in _TYPES.items()}
_BLOCK = 1 << 20

_PARTS = ("tokens.bin", "lengths.bin", "spans.bin", "span_counts.bin", "lines.bin", "kinds.bin", "margins.bin")
"""What grows while a store is written, in this order."""


class Mapped:
    """A file as an array; only pages that are read come into memory, and `forget` gives them back."""

    def __init__(self, path: Path, dtype: str, *, offset: int = 0, count: int | None = None) -> None:
        size = path.stat().st_size
        self._map: mmap.mmap | None = None
        self.array: NDArray[Any] = np.zeros(0, dtype)
        if size > offset:  # a file without bytes cannot be mapped
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.array = np.frombuffer(self._map, dtype, count=-1 if count is None else count, offset=offset)

    def forget(self) -> None:
        """Give back the memory of the pages that were read; they stay in the file cache."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class RandomFile:
    """A file of the cache that is read in pieces, at any place, by any number of threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._handle).st_size
        """Bytes."""

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read(self, start: int, count: int) -> bytes:
        """Some bytes.

        Raises:
            DataError: they cannot be read.
        """
        try:
            data = os.pread(self._handle, count, start)
        except OSError as error:
            raise self._failed(start, error.strerror) from None
        if len(data) != count:
            raise self._failed(start, f"it ends after {start + len(data)} bytes")
        return data

    def read_into(self, start: int, array: NDArray[Any]) -> None:
        """Fill an array.

        Raises:
            DataError: the file cannot be read so far.
        """
        try:
            count = os.preadv(self._handle, [array.data], start)
        except OSError as error:
            raise self._failed(start, error.strerror) from None
        if count != array.nbytes:
            raise self._failed(start, f"it ends after {start + count} bytes")

    def _failed(self, start: int, why: str | None) -> DataError:
        return DataError(
            f"{self._path}: cannot be read at byte {start} ({why}). Was the cache changed, or the disk lost? "
            "Start the same command again; a damaged cache is built anew."
        )


class Store:
    """Documents, numbered from 0."""

    dtype: np.dtype[Any]
    """Of the tokens."""
    lengths: NDArray[np.int32]
    """Tokens of each document: (num_documents,)."""
    kinds: NDArray[np.int8] | None = None
    """Of each document, as protocols names them: (num_documents,); None: all are 0."""
    numbers: dict[str, RandomFile]
    """What else is known of each document, by name: files of (num_documents,) float64."""
    _spans: NDArray[np.int32] | None = None
    _span_offsets: Ints | None = None

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.lengths)

    def first_tokens(self, documents: Ints) -> Ints:
        """Where these documents start in the tokens of all, laid end to end."""
        raise NotImplementedError

    def copy_tokens(self, first: int, into: NDArray[Any]) -> None:
        """Fill an array of `dtype` with the tokens from `first` on."""
        raise NotImplementedError

    def spans_of(self, documents: Ints) -> tuple[Ints, Ints]:
        """Trained token positions, relative to the document.

        Returns:
            Spans (num_spans, 2), first and one after the last, in the order of the documents; and how many each document has.
        """
        if self._spans is None or self._span_offsets is None:  # every token is trained
            lengths = self.lengths[documents].astype(np.int64)
            return np.stack([np.zeros_like(lengths), lengths], axis=1), np.ones_like(lengths)
        first = self._span_offsets[documents]
        counts = self._span_offsets[documents + 1] - first
        return self._spans[ranges(first, counts)].astype(np.int64), counts


class ChunkStore(Store):
    """The documents of a few chunks, in memory."""

    def __init__(self, chunks: Sequence[TokenizedChunk]) -> None:
        self._tokens = np.concatenate([chunk.tokens for chunk in chunks])
        self.numbers = {}  # stages that have any do not stream
        self.dtype = self._tokens.dtype
        self.lengths = np.concatenate([chunk.lengths for chunk in chunks])
        self._first = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        spans = [chunk.spans for chunk in chunks if chunk.spans is not None]
        counts = [chunk.span_counts for chunk in chunks if chunk.span_counts is not None]
        if spans:
            self._spans = np.concatenate(spans)
            self._span_offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])

    def first_tokens(self, documents: Ints) -> Ints:
        """Where these documents start in the tokens of all, laid end to end."""
        return self._first[documents]

    def copy_tokens(self, first: int, into: NDArray[Any]) -> None:
        """Fill an array of `dtype` with the tokens from `first` on."""
        into[:] = self._tokens[first : first + len(into)]


class TokenStore(Store):
    """The documents of one source, in files.

    What is gone through in order is memory-mapped; tokens, which are read at random, are not.
    """

    def __init__(self, folder: Path) -> None:
        index = read_index(folder / "tokens.idx")
        self.file = RandomFile(folder / "tokens.bin")
        """All tokens, end to end."""
        self.dtype = np.dtype(index.dtype)
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        """What was counted while it was written."""
        self.lengths = index.lengths
        self._bytes = index.positions
        self._mapped = list(index.mapped)
        if (folder / "spans.bin").exists():
            spans = Mapped(folder / "spans.bin", "<i4")
            offsets = Mapped(folder / "span_offsets.bin", "<i8")
            self._spans, self._span_offsets = spans.array.reshape(-1, 2), offsets.array
            self._mapped += [spans, offsets]
        self._lines = Mapped(folder / "lines.bin", "<i8").array
        if (folder / "kinds.bin").exists():
            self.kinds = Mapped(folder / "kinds.bin", "i1").array
        has_margins = MARGIN_COUNT in self.meta.get("counts", {})
        self.numbers = {"margin": RandomFile(folder / "margins.bin")} if has_margins else {}

    def first_tokens(self, documents: Ints) -> Ints:
        """Where these documents start in the tokens of all, laid end to end."""
        return self._bytes[documents] // self.dtype.itemsize

    def copy_tokens(self, first: int, into: NDArray[Any]) -> None:
        """Fill an array of `dtype` with the tokens from `first` on."""
        self.file.read_into(first * self.dtype.itemsize, into)

    def sample(self, document: int) -> tuple[list[int], list[bool]]:
        """The token ids of a document, and which of them are trained."""
        first, length = int(self.first_tokens(np.array([document]))[0]), int(self.lengths[document])
        trained = np.zeros(length, bool)
        for start, end in self.spans_of(np.array([document]))[0].tolist():
            trained[start:end] = True
        tokens = np.empty(length, self.dtype)
        self.copy_tokens(first, tokens)
        return tokens.tolist(), trained.tolist()

    def line(self, document: int) -> int:
        """The line or row that the document stands on in its file."""
        return int(self._lines[document])

    def forget(self) -> None:
        """Give back the memory of the pages that were read."""
        for each in self._mapped:
            each.forget()


@dataclass(frozen=True, slots=True)
class Index:
    """What a `.idx` file says."""

    dtype: str
    lengths: NDArray[np.int32]
    positions: NDArray[np.int64]
    """Byte of the `.bin` file each sequence starts at."""
    mapped: tuple[Mapped, Mapped]


def read_index(path: Path) -> Index:
    """Read Megatron's index.

    Raises:
        DataError: it is no such index, or the tokens beside it are missing or too short.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror} ({path.absolute()}).") from None
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{path}: no Megatron index (it begins with {header[:9]!r}). Give the .idx of a tokenised corpus.")
    _, version, code, count, marks = _HEADER.unpack(header)
    if version != 1 or code not in _TYPES:
        raise DataError(f"{path}: version {version} with tokens of type {code} is not known; version 1 with whole numbers is.")
    if size < _HEADER.size + 12 * count + 8 * marks:
        raise DataError(f"{path}: {size:,} bytes, too few for the {count:,} sequences it names. Was it copied as a whole?")
    lengths = Mapped(path, "<i4", offset=_HEADER.size, count=count)
    positions = Mapped(path, "<i8", offset=_HEADER.size + 4 * count, count=count)
    dtype = np.dtype(_TYPES[code])
    tokens = path.with_suffix(".bin")
    needed = int(positions.array[-1]) + int(lengths.array[-1]) * dtype.itemsize if count else 0
    found = tokens.stat().st_size if tokens.exists() else -1
    if found < needed or found % dtype.itemsize:
        state = "is missing" if found < 0 else f"has {found:,} bytes of the {needed:,} the index needs"
        raise DataError(f"{tokens}: {state}. A tokenised corpus is the two files {path.name} and {tokens.name}.")
    return Index(dtype.name, lengths.array, positions.array, (lengths, positions))


class StoreWriter:
    """Appends documents to a store, with memory that does not grow with their number.

    What is on disk at a call of `sync` can be taken up again: the sizes it returns say how much of each file counts.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int] | None = None) -> None:
        self.folder = folder
        self._files: dict[str, IO[bytes]] = {}
        for name in _PARTS:
            file = open(folder / name, "ab", buffering=_BLOCK)  # noqa: SIM115
            file.truncate((sizes or {}).get(name, 0))
            file.seek(0, os.SEEK_END)  # or `tell` would still count what was cut off
            self._files[name] = file
        self.dtype = "uint16"

    def append(self, chunk: TokenizedChunk) -> None:
        """Write the documents of a chunk."""
        self.dtype = chunk.tokens.dtype.name
        arrays = (chunk.tokens, chunk.lengths, chunk.spans, chunk.span_counts, chunk.lines, chunk.kinds, chunk.margins)
        for name, values in zip(_PARTS, arrays, strict=True):
            if values is not None:
                self._files[name].write(np.ascontiguousarray(values).data)

    def sync(self) -> dict[str, int]:
        """Bring everything to the disk; returns the size of each file."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def finish(self, dtype: str) -> None:
        """Write the indices, and leave only the files of a complete store."""
        self.close()
        write_index(self.folder / "tokens.idx", Mapped(self.folder / "lengths.bin", "<i4").array, dtype)
        counts = Mapped(self.folder / "span_counts.bin", "<i4").array
        if len(counts):
            with open(self.folder / "span_offsets.bin", "wb") as file:
                file.write(np.zeros(1, "<i8").data)
                for values in _running_sums(counts):
                    file.write(values.data)
        else:
            (self.folder / "spans.bin").unlink()
        for name in ("lengths.bin", "span_counts.bin"):
            (self.folder / name).unlink()
        for name in ("kinds.bin", "margins.bin"):
            if not (self.folder / name).stat().st_size:
                (self.folder / name).unlink()

    def close(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk has been told of already, by the write
                file.close()


def write_index(path: Path, lengths: NDArray[np.int32], dtype: str) -> None:
    """Write Megatron's index for sequences that lie end to end, each a document of its own."""
    count, itemsize = len(lengths), np.dtype(dtype).itemsize
    with open(path, "wb", buffering=_BLOCK) as file:
        file.write(_HEADER.pack(MAGIC, 1, _CODES[dtype], count, count + 1))
        for start in range(0, count, _BLOCK):
            file.write(np.ascontiguousarray(lengths[start : start + _BLOCK], "<i4").data)
        for ends, own in zip(_running_sums(lengths), _blocks(lengths), strict=True):
            file.write(((ends - own) * itemsize).data)
        for start in range(0, count + 1, _BLOCK):
            file.write(np.arange(start, min(start + _BLOCK, count + 1), dtype="<i8").data)


def ranges(starts: Ints, counts: Ints) -> Ints:
    """The numbers starts[i] ... starts[i] + counts[i] - 1 for each i, end to end."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - ends + counts, counts)


def _blocks(values: NDArray[Any]) -> Iterable[NDArray[Any]]:
    return (values[start : start + _BLOCK] for start in range(0, len(values), _BLOCK))


def _running_sums(values: NDArray[Any]) -> Iterable[Ints]:
    """The sum of all values up to each one, inclusive, a block at a time."""
    total = 0
    for block in _blocks(values):
        sums = np.cumsum(block, dtype=np.int64) + total
        total = int(sums[-1])
        yield sums


def bring_corpus(index: Path, dtype: str) -> Iterable[tuple[TokenizedChunk, float]]:
    """The sequences of an existing Megatron corpus as chunks of trained documents, and how much of it is read.

    Raises:
        DataError: the corpus is damaged, or holds a token that `dtype` cannot.
    """
    found = read_index(index)
    tokens = Mapped(index.with_suffix(".bin"), found.dtype)
    count = len(found.lengths)
    largest = np.iinfo(dtype).max
    at = 0
    while at < count:
        lengths = found.lengths[at : at + 65536]
        fitting = max(1, int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), 4 << 20)))
        lengths = lengths[: min(fitting, count - at)].astype(np.int32)
        starts, odd = np.divmod(found.positions[at : at + len(lengths)], np.dtype(found.dtype).itemsize)
        outside = (lengths < 0) | (starts < 0) | (odd != 0) | (starts + lengths > len(tokens.array))
        if bool(outside.any()):
            raise DataError(f"{index}: a sequence after number {at} lies outside of the tokens. The index is damaged.")
        ids = tokens.array[ranges(starts, lengths.astype(np.int64))]
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) > largest):
            foreign = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise DataError(
                f"{index}: holds the token {foreign}, beyond the vocabulary of the tokenizer. "
                "Was the corpus made with another one? model.tokenizer"
            )
        filled = lengths > 0
        chunk = TokenizedChunk(
            tokens=ids.astype(dtype),
            lengths=lengths[filled],
            spans=None,
            span_counts=None,
            lines=np.arange(at + 1, at + 1 + len(lengths))[filled],
            read=len(lengths),
            bad=(),
            counts={"empty texts": int((~filled).sum())} if not filled.all() else {},
        )
        at += len(lengths)
        yield chunk, at / count
        tokens.forget()


def where(files: Sequence[Mapping[str, Any]], document: int) -> str:
    """The path of the file that a document comes from; `files` is kept in the store's report, in order."""
    path = ""
    for each in files:
        if each["first_document"] > document:
            break
        path = each["path"]
    return path
