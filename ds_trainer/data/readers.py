"""Read files into chunks at little cost, and parse chunks into records, so that every complaint can name path and line."""

from __future__ import annotations

import csv
import gzip
import heapq
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ds_trainer.data.chunks import BadRecord, BadRecordError, Chunk, Record
from ds_trainer.errors import DataError

if TYPE_CHECKING:
    from ds_trainer.data.sources import FoundSource

Kind = Literal["json_lines", "json", "csv", "parquet", "arrow", "text", "tokens"]
"""How a file is read."""
Item = tuple[int, int, Record | BadRecord]
"""Line or row, size in bytes or characters, and what was read there."""

BLOCK_BYTES = 2**20
"""A chunk holds about so much text, or CHUNK_RECORDS records if that is less."""
CHUNK_RECORDS = 1000
MAX_LINE_BYTES = 64 * 2**20
"""A longer line, cell or text file is no record; it is never held in memory."""
MAX_LIST_BYTES = 2**30
"""A JSON list is read whole, so it must be smaller than this."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# Found at the start of a file: what it is, and how to have it read. None: by no name.
_MAGIC: tuple[tuple[bytes, str, str | None], ...] = (
    (b"\x1f\x8b", "gzip data", ".gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", ".zst"),
    (b"PAR1", "Parquet", ".parquet"),
    (b"ARROW1\0\0", "Arrow data", ".arrow"),
    (b"\xff\xff\xff\xff", "Arrow data", ".arrow"),
    (b"MMIDIDX\0\0", "a Megatron index", ".idx"),
    (b"PK\x03\x04", "a zip archive", None),
    (b"\xfd7zXZ\0", "xz data", None),
    (b"BZh91AY&SY", "bzip2 data", None),
    (b"\xff\xfe", "UTF-16", None),
    (b"\xfe\xff", "UTF-16", None),
)
_NEEDED: dict[str, str] = {"parquet": "Parquet", "arrow": "Arrow data", "tokens": "a Megatron index"}
_PACKED = {".gz": "gzip data", ".zst": "zstd data"}


def read_chunks(found: FoundSource) -> Iterator[Chunk]:
    """Read the files of a source in their order; what it costs is little more than reading the bytes.

    Borders depend on the files alone, a chunk never spans two files, and memory stays bounded whatever a file or line holds.

    Raises:
        DataError: a file cannot be read, is damaged, or is not what its name says. These are
            never skipped, as nobody could tell how many records that loses.
    """
    assert found.kind != "tokens", "a corpus of tokens holds no records"
    parsers = {"json": _list_elements, "csv": _csv_records, "text": _document}
    for path in found.files:
        check_magic(path, found.kind)
        if found.kind in ("parquet", "arrow"):
            yield from _mark_last(path, _row_chunks(path, found.kind))
            continue
        with closing(_Stream(path)) as stream:
            parse = parsers.get(found.kind)
            yield from _mark_last(path, _group(path, parse(stream), stream.done) if parse else _line_chunks(stream))


def parse_chunk(chunk: Chunk, counts: Counter[str] | None = None) -> Iterator[tuple[int, Record] | BadRecord]:
    """Parse a chunk into records with their lines or rows, in order.

    The reader's own bad records (`chunk.bad`) come along, each in its place: who takes these has them all.

    Args:
        chunk: from `read_chunks`.
        counts: `blank lines` is added to.
    """
    if isinstance(chunk.content, bytes):
        parsed = _parse_lines(chunk, chunk.content, Counter() if counts is None else counts)
    elif isinstance(chunk.content, list):
        parsed = iter(chunk.content)
    else:
        parsed = _parse_rows(chunk.path, chunk.content, chunk.first)
    return heapq.merge(chunk.bad, parsed, key=lambda each: each.line if isinstance(each, BadRecord) else each[0])


def check_magic(path: Path, kind: Kind) -> None:
    """Compare the first bytes of a file with its name; an empty file passes, it is a bad record later on.

    Raises:
        DataError: the file cannot be read, or is something else.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise _damaged(path, 0, error) from None
    if head:
        _check_head(path, head, _NEEDED.get(kind) or _PACKED.get(path.suffix.lower()))


def json_kind(path: Path) -> Literal["json_lines", "json"]:
    """Whether a file named .json is one list or has an object a line: its first byte that is not blank decides.

    Raises:
        DataError: the file cannot be read, or is not what its name says.
    """
    check_magic(path, "json_lines")
    with closing(_Stream(path)) as stream:
        head = stream.read(BLOCK_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not head:
        raise DataError(f"{path}: {_EMPTY}.")
    return "json" if head.startswith(b"[") else "json_lines"


class _Stream:
    """The unpacked bytes of a file. Its errors name the file and the line that was reached."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0
        """Last line that was read whole; the readers keep it."""
        try:
            self._packed = open(path, "rb", buffering=0)  # noqa: SIM115 - `close` closes it
        except OSError as error:
            raise _damaged(path, 0, error) from None
        try:
            self._size = max(1, path.stat().st_size)
            self._file = self._open()
            if path.suffix.lower() in _PACKED:
                _check_head(path, self._file.peek(16)[:16], None)
        except (OSError, EOFError, zlib.error) as error:
            self._packed.close()
            raise _damaged(path, 0, error) from None
        except DataError:
            self._packed.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._packed.close()

    def done(self) -> float:
        """How much of the file has been read, 0 to 1."""
        return self._packed.tell() / self._size

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end of the file."""
        try:
            block: bytes = self._file.read(size)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(self.path, self.line, error) from None
        return block

    def lines(self) -> Iterator[bytes]:
        """Line by line, for formats whose records may span lines.

        Raises:
            DataError: a line is longer than MAX_LINE_BYTES.
        """
        try:
            while line := self._file.readline(MAX_LINE_BYTES + 1):
                self.line += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{self.path}:{self.line}: {_TOO_LONG}")
                yield line
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(self.path, self.line, error) from None

    def _open(self) -> Any:
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            return io.BufferedReader(gzip.GzipFile(fileobj=self._packed), BLOCK_BYTES)
        if suffix != ".zst":
            return io.BufferedReader(self._packed, BLOCK_BYTES)
        import pyarrow  # type: ignore[import-untyped]

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(self._packed, "r"), "zstd"), BLOCK_BYTES)


_EMPTY = "the file is empty; fill it or leave it out of the source"
_TOO_LONG = (
    f"a line of more than {MAX_LINE_BYTES // 2**20} MiB, which is no record; is a newline missing between records? "
    "Split the document or leave it out"
)


def _mark_last(path: Path, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Look one chunk ahead, so that the readers need not know which is the last; a file without any gets one that says so."""
    held = next(chunks, Chunk(str(path), 1, b"", bad=(BadRecord(str(path), 0, "empty file", _EMPTY),)))
    for chunk in chunks:
        yield held
        held = chunk
    yield replace(held, is_last=True, done=1.0)


def _line_chunks(stream: _Stream) -> Iterator[Chunk]:
    """Blocks of whole lines. A line that goes on past its block is kept in parts, until it is too long to be one."""
    path, filled, at_end = str(stream.path), False, False
    parts: list[bytes] = []
    held = 0
    while not at_end:
        block = stream.read(BLOCK_BYTES)
        at_end = len(block) < BLOCK_BYTES
        cut = len(block) if at_end else block.rfind(b"\n") + 1
        if not cut and not at_end:
            held += len(block)
            parts = [*parts, block] if held <= MAX_LINE_BYTES else []
            continue
        line_end = block.find(b"\n")
        bad: tuple[BadRecord, ...] = ()
        if held + (len(block) if line_end < 0 else line_end) > MAX_LINE_BYTES:
            stream.line += 1
            bad = (BadRecord(path, stream.line, "line too long", _TOO_LONG),)
            content = block[line_end + 1 : cut] if line_end >= 0 else b""
        else:
            content = b"".join([*parts, block[:cut]])
        text = content.removeprefix(_BYTE_ORDER_MARK) if stream.line == 0 else content
        if filled or bad or (text and not text.isspace()):  # a file of blank lines is an empty one
            filled = True
            if bad or content:
                yield Chunk(path, stream.line + 1, content, bad=bad, done=stream.done())
        stream.line += content.count(b"\n")
        parts, held = [block[cut:]], len(block) - cut


def _list_elements(stream: _Stream) -> Iterator[Item]:
    """What stands between two elements says where the next one starts, even if the one before is bad."""
    path, raw = stream.path, stream.read(MAX_LIST_BYTES + 1)
    if len(raw) > MAX_LIST_BYTES:
        raise DataError(
            f"{path}: a JSON list of more than {MAX_LIST_BYTES // 2**20} MiB; a list is read whole. "
            f"Make it one object a line with `jq -c '.[]'` and name it {path.name.split('.')[0]}.jsonl."
        )
    try:
        text = _decode(raw.removeprefix(_BYTE_ORDER_MARK))
    except BadRecordError as error:
        raise DataError(f"{path}:{_bad_line(raw)}: {error}") from None
    del raw
    line, counted, is_first = 1, 0, True
    start = _skip_blanks(text, 0)
    if not text.startswith("[", start):
        raise _broken_list(path, text, start, "expecting '['")
    start += 1
    while True:
        start = _skip_blanks(text, start)
        if text.startswith("]", start):
            break
        if not is_first:
            if not text.startswith(",", start):
                raise _broken_list(path, text, start, "expecting ',' or ']'")
            start = _skip_blanks(text, start + 1)
        line, counted, is_first = line + text.count("\n", counted, start), start, False
        try:
            record, end = _DECODER.raw_decode(text, start)
            item: Record | BadRecord = _object(record)
        except (BadRecordError, RecursionError, ValueError) as error:
            try:  # where the element ends, if it does
                end = _LENIENT.raw_decode(text, start)[1]
            except json.JSONDecodeError as broken:
                raise _broken_list(path, text, broken.pos, broken.msg) from None
            except RecursionError:
                raise _broken_list(path, text, start, "nested too deeply") from None
            item = _bad(str(path), line, _explain(error))
        yield line, end - start, item
        start = end
    start = _skip_blanks(text, start + 1)
    if start < len(text):
        raise _broken_list(path, text, start, "more text after the list")


def _csv_records(stream: _Stream) -> Iterator[Item]:
    path, doubts, size = str(stream.path), list[BadRecordError](), 0

    def lines() -> Iterator[str]:
        nonlocal size
        for raw in stream.lines():
            size += len(raw)
            raw = raw.removeprefix(_BYTE_ORDER_MARK) if stream.line == 1 else raw
            try:
                yield _decode(raw)
            except BadRecordError as error:  # the record is refused once it is known where it ends
                doubts.append(error)
                yield raw.decode("utf-8", errors="replace").replace("\0", " ")

    csv.field_size_limit(MAX_LINE_BYTES)  # of the process; the module has no other place for it
    rows = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    while True:
        start = stream.line + 1
        size, item = 0, None
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error) or "field limit" in str(error):
                raise DataError(f"{path}:{start}: a quote is opened and never closed ({error}); close it.") from None
            item = BadRecord(path, start, "invalid CSV", f"not valid CSV ({error}); double the quotes inside a quoted cell")
            cells = []
        if doubts:
            item = _bad(path, start, doubts[0])
            doubts.clear()
        if header is None and (cells or item):
            if item:
                raise DataError(f"{item}")
            header = _check_header(path, start, cells)
        elif header is not None and (cells or item):
            if item is None and len(cells) != len(header):
                what = f"{len(cells)} cells, but the header has {len(header)}; give each column one, quote cells with commas"
                item = BadRecord(path, start, "wrong number of cells", what)
            yield start, size, item or dict(zip(header, cells, strict=True))


def _check_header(path: str, line: int, names: list[str]) -> list[str]:
    where = f"{path}:{line}"
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise DataError(f"{where}: the cells seem to be separated by semicolons or tabs; save the file with commas.")
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise DataError(f"{where}: column {number} of the header has no name; name it.")
    _check_columns(where, names)
    return names


def _document(stream: _Stream) -> Iterator[Item]:
    path = str(stream.path)
    raw = stream.read(MAX_LINE_BYTES + 1).removeprefix(_BYTE_ORDER_MARK)
    if len(raw) > MAX_LINE_BYTES:
        raise DataError(
            f"{path}: a text file is one document, and this one is larger than {MAX_LINE_BYTES // 2**20} MiB. "
            'Split it, or write its documents as {"text": ...}, one a line, to a .jsonl file.'
        )
    if raw.strip():
        try:
            yield 1, len(raw), {"text": _decode(raw)}
        except BadRecordError as error:
            yield _bad_line(raw), 0, _bad(path, _bad_line(raw), error)


def _row_chunks(path: Path, kind: str) -> Iterator[Chunk]:
    import pyarrow

    first = 1
    try:
        for batch, done in _batches(path, kind):
            try:
                batch.validate(full=True)
            except pyarrow.ArrowInvalid:
                yield from _group(path, _row_by_row(str(path), batch, first), partial(float, done))
            else:
                rows = max(1, min(CHUNK_RECORDS, BLOCK_BYTES * batch.num_rows // max(1, batch.nbytes)))
                for start in range(0, batch.num_rows, rows):
                    stop = min(start + rows, batch.num_rows)
                    # A slice would take the whole batch along when it is sent to another process.
                    yield Chunk(str(path), first + start, batch.take(pyarrow.array(range(start, stop))), done=done)
            first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, first - 1, error) from None


def _batches(path: Path, kind: str) -> Iterator[tuple[Any, float]]:
    """Batches, each with how much of the file has been read."""
    import pyarrow

    size = path.stat().st_size
    if size and kind == "parquet":
        import pyarrow.parquet  # type: ignore[import-untyped]

        # Without these two settings a row group is held whole, whatever its size.
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
            _check_columns(path, file.schema_arrow.names)
            rows = 0
            for batch in file.iter_batches(CHUNK_RECORDS, use_threads=False):
                rows += batch.num_rows
                yield batch, rows / file.metadata.num_rows
    elif size:
        with pyarrow.memory_map(str(path)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            table = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
            _check_columns(path, table.schema.names)
            if not is_file:
                yield from ((batch, mapped.tell() / size) for batch in table)
                return
            for index in range(table.num_record_batches):
                yield table.get_batch(index), (index + 1) / table.num_record_batches


def _check_columns(where: object, names: list[str]) -> None:
    twice = [name for name in set(names) if names.count(name) > 1]
    if twice:
        raise DataError(f"{where}: has two columns `{min(twice)[:40]}`; rename one of them.")


def _row_by_row(path: str, batch: Any, first: int) -> Iterator[Item]:
    """The rows of a batch that holds something invalid."""
    for index in range(batch.num_rows):
        row, size = batch.slice(index, 1), 0
        try:
            row.validate(full=True)
            item, size = row.to_pylist()[0], row.nbytes
        except (ValueError, OverflowError) as error:  # Arrow's own is a ValueError
            reason = "invalid UTF-8" if "UTF8" in str(error) else "unreadable value"
            what = f"a value that cannot be read ({_one_line(error)}); correct it, or leave out its column or row"
            item = BadRecord(path, first + index, reason, what)
        yield first + index, size, item


def _group(path: Path, items: Iterator[Item], done: Callable[[], float]) -> Iterator[Chunk]:
    """Chunks of records, for the readers that parse as they read."""
    records: list[tuple[int, Record]] = []
    bad: list[BadRecord] = []
    first, held = 0, 0
    for line, size, item in items:
        first, held = first or line, held + size
        if isinstance(item, BadRecord):
            bad.append(item)
        else:
            records.append((line, item))
        if len(records) + len(bad) >= CHUNK_RECORDS or held >= BLOCK_BYTES:
            yield Chunk(str(path), first, records, bad=tuple(bad), done=done())
            records, bad, first, held = [], [], 0, 0
    if records or bad:
        yield Chunk(str(path), first, records, bad=tuple(bad), done=done())


def _parse_rows(path: str, batch: Any, first: int) -> Iterator[tuple[int, Record] | BadRecord]:
    try:
        yield from enumerate(batch.to_pylist(), start=first)
    except (ValueError, OverflowError):  # a date, say, that Python has no value for: find the row
        for row, _, item in _row_by_row(path, batch, first):
            yield item if isinstance(item, BadRecord) else (row, item)


def _parse_lines(chunk: Chunk, content: bytes, counts: Counter[str]) -> Iterator[tuple[int, Record] | BadRecord]:
    if chunk.first == 1:
        content = content.removeprefix(_BYTE_ORDER_MARK)
    lines = content.split(b"\n")
    last = chunk.first + len(lines) - 1 if chunk.is_last and lines[-1] else 0
    if not lines[-1]:
        lines.pop()
    blank = 0
    for line, raw in enumerate(lines, start=chunk.first):
        if not raw or raw.isspace():
            blank += 1
            continue
        try:
            record = _object(_DECODER.decode(_decode(raw)))
        except (BadRecordError, RecursionError, ValueError) as error:
            why = _explain(error, raw)
            if line == last and why.reason in ("invalid JSON", "invalid UTF-8"):
                what = f"the file ends in the middle of this line: {why}. Finish it, or copy the file again"
                why = BadRecordError("truncated last line", what)
            yield _bad(chunk.path, line, why)
        else:
            yield line, record
    if blank:
        counts["blank lines"] += blank


def _decode(raw: bytes) -> str:
    nul = raw.find(0)
    if nul >= 0:
        what = f"byte {nul + 1} is NUL; is this UTF-16, or no text at all? Save it as UTF-8 ({_beginning(raw)})"
        raise BadRecordError("NUL byte", what)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} (0x{raw[error.start]:02x})"
        raise BadRecordError("invalid UTF-8", f"{byte} is not UTF-8; save the file as UTF-8 ({_beginning(raw)})") from None


def _explain(error: Exception, raw: bytes = b"") -> BadRecordError:
    """What an error of the decoder means."""
    shown = f" ({_beginning(raw)})" if raw else ""
    if isinstance(error, BadRecordError):
        return error
    if isinstance(error, RecursionError):
        return BadRecordError("nested too deeply", f"nested too deeply for a record; is this the right file?{shown}")
    if not isinstance(error, json.JSONDecodeError):
        return BadRecordError("number too long", f"a number that cannot be read ({_one_line(error)}); shorten it{shown}")
    rule = "write one JSON object a line"
    if raw.startswith(_BYTE_ORDER_MARK):
        rule = "a byte order mark inside the file, as when two files were joined; remove its three bytes"
    elif raw.startswith(b"["):
        rule += "; if the file is one list, name it .json"
    return BadRecordError("invalid JSON", f"not valid JSON ({error.msg}, column {error.colno}); {rule}{shown}")


def _object(value: Any) -> Record:
    if isinstance(value, dict):
        return value
    kind = "a list" if isinstance(value, list) else "a single value"
    raise BadRecordError("not an object", f"the record is {kind}; write JSON objects, as `jq -c '.[]'` makes of a list")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRecordError("duplicate key", f"the key `{twice[:40]}` stands twice in one object; remove one of them")
    return record


def _refuse_constant(name: str) -> Any:
    raise BadRecordError("not a finite number", f"{name} is no JSON value; write a finite number or null")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        what = f"{digits[:40]} is too large for a number; write a finite number or null"
        raise BadRecordError("not a finite number", what)
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite)
_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)


def _bad(path: str, line: int, error: BadRecordError) -> BadRecord:
    return BadRecord(path, line, error.reason, str(error))


def _bad_line(raw: bytes) -> int:
    """The line on which the first byte stands that is no text."""
    position = raw.find(b"\0")
    if position < 0:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            position = error.start
    return raw.count(b"\n", 0, max(0, position)) + 1


def _beginning(raw: bytes) -> str:
    shown = repr(raw[:60])[1:]
    return f"it begins with {shown[:-1]}{'...' if len(raw) > 60 else ''}{shown[-1]}"


def _skip_blanks(text: str, start: int) -> int:
    while text[start : start + 1] in (" ", "\t", "\r", "\n"):
        start += 1
    return start


def _broken_list(path: Path, text: str, position: int, what: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return DataError(f"{path}:{line}: not a valid JSON list ({what}, column {column}); correct it, or is the file cut short?")


def _check_head(path: Path, head: bytes, needed: str | None) -> None:
    """Refuse bytes that are not what is `needed`; None is text."""
    looks, suffix = next(((what, suffix) for magic, what, suffix in _MAGIC if head.startswith(magic)), (None, None))
    if looks is None and needed is None and len(head) >= 4 and (head[1] == head[3] == 0 or head[0] == head[2] == 0):
        looks = "UTF-16"
    if looks == needed or not head:
        return
    if looks is None:
        advice = "if it is text, remove that ending" if needed in _PACKED.values() else "give it the name of what it is"
        raise DataError(f"{path}: is not {needed}, as its name says; {advice}, or write the file again if it is damaged.")
    if looks == "UTF-16":
        advice = f"save it as UTF-8, as by `iconv -f UTF-16 -t UTF-8 {path.name}`"
    elif suffix is None:
        advice = "unpack it first"
    elif suffix in _PACKED:
        advice = f"rename it to {path.name + suffix if path.suffix not in _PACKED else path.stem + suffix}"
    else:
        advice = f"rename it to {path.stem + suffix}"
    raise DataError(f"{path}: looks like {looks}, which its name does not say; {advice}.")


def _damaged(path: Path, line: int, error: Exception) -> DataError:
    """What stopped the reading: the file system (it gives a number), or what the bytes say."""
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{path}: cannot be read: {error.strerror} ({path.absolute()}).")
    unit = "row" if path.suffix.lower() in (".parquet", ".arrow") else "line"
    return DataError(
        f"{path}: damaged or cut short after {unit} {line} ({_one_line(error)}). Copy or make the file again; "
        "what is lost in it cannot be counted, so it is not skipped."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
