"""Find the files of a source, and read their records so that every complaint can name path and line."""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ds_trainer.arguments.schema import Source
from ds_trainer.data.formats import FORMATS, BadRecordError, Conversation, Format, Record, fitting_formats
from ds_trainer.errors import DataError, Problem

Stage = Literal["pretrain", "sft"]
Report = Callable[[str], None]
"""Takes one line meant for the user."""

JSON_LINES = (".jsonl", ".json", ".ndjson")
MAX_PROBLEMS = 5
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Sample(NamedTuple):
    """One record, read and checked."""

    where: str
    """`path:line`."""
    content: str | Conversation
    """A text to pretrain on, or a conversation to fine-tune on."""


@dataclass(frozen=True, slots=True)
class FoundSource:
    """The files of one source, and how to read them."""

    files: tuple[Path, ...]
    """Sorted; relative if the run file's path is."""
    format: Format


class Problems:
    """Collects what is wrong with the records, so that the user sees the first few together."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def add(self, where: str, what: str) -> None:
        """Keep a problem.

        Raises:
            DataError: this was the last of MAX_PROBLEMS; reading on would only cost time.
        """
        self._found.append(Problem(where=where, what=what))
        if len(self._found) == MAX_PROBLEMS:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise all problems as one error.

        Raises:
            DataError: there is at least one problem.
        """
        if not self._found:
            return
        count = len(self._found)
        first = "the first " if count == MAX_PROBLEMS else ""
        head = f"{first}{count} {'problem' if count == 1 else 'problems'}"
        raise DataError("\n".join([f"{head} in the data; nothing was started.", *(f"  {each}" for each in self._found)]))


def find_sources(sources: Sequence[Source], stage: Stage, report: Report) -> list[FoundSource]:
    """Find the files of every source and decide how each source is read.

    Args:
        sources: as the run file has them; paths are relative to the current folder.
        stage: `pretrain` needs texts, `sft` conversations.
        report: is told the format of each source, and which keys of its records are not used.

    Raises:
        DataError: no such file, an unknown format, or one that the stage cannot train on.
    """
    found = []
    for source in sources:
        files = _find_files(source.path)
        first = _first_keys(files[0])
        format = _detect_format(source, files[0], first) if source.format == "auto" else source.format
        _check_stage(source.path, format, stage)
        for file in files:
            if format != "text" and not _is_json_lines(file):
                raise DataError(
                    f"{file}: format {format} is read from JSON lines, one object a line, in a file named "
                    f"{', '.join(JSON_LINES)}. Convert it to {file.with_suffix('.jsonl')}."
                )
        if source.format != "auto":
            how = "as stated"
        else:
            how = "by the keys of its first record" if _is_json_lines(files[0]) else "one document a file"
        unused = sorted(key for key in first if key not in FORMATS[format].keys)
        ignored = f"; not used: {', '.join(unused)}" if unused else ""
        plural = "file" if len(files) == 1 else "files"
        report(f"{source.path}: {len(files)} {plural}, format {format} ({how}){ignored}")
        found.append(FoundSource(files=files, format=format))
    return found


def read_samples(source: FoundSource, problems: Problems) -> Iterator[Sample]:
    """Read the records of a source, in the order of its files; a bad one goes to `problems` and is left out.

    Raises:
        DataError: a file cannot be opened, or `problems` is full.
    """
    convert = FORMATS[source.format].convert
    for path in source.files:
        for line, record in _read_records(path, problems):
            where = f"{path}:{line}"
            try:
                content = convert(record)
            except BadRecordError as error:
                problems.add(where, f"{error}. (Format {source.format}.)")
            else:
                yield Sample(where, content)


def _find_files(pattern: str) -> tuple[Path, ...]:
    if os.path.isdir(pattern):
        raise DataError(f"{pattern}: is a folder; a source is a file or a glob. Write {os.path.join(pattern, '*.jsonl')}.")
    # A path that exists is meant literally, even if it holds brackets or stars.
    names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    files = tuple(Path(name) for name in names if os.path.isfile(name))
    if not files:
        raise DataError(
            f"{pattern}: matches no file ({os.path.abspath(pattern)}). Paths are relative to the current folder; "
            "correct the path, or write an absolute one."
        )
    return files


def _is_json_lines(path: Path) -> bool:
    return path.suffix.lower() in JSON_LINES


def _first_keys(path: Path) -> list[str]:
    """The keys of the first readable record: bad ones before it are reported when the file is read as a whole."""
    if not _is_json_lines(path):
        return ["text"]
    problems = Problems()
    for _, record in _read_records(path, problems):
        return list(record)
    problems.raise_if_any()
    raise AssertionError("a file without records is a problem")


def _detect_format(source: Source, path: Path, keys: Sequence[str]) -> Format:
    if not _is_json_lines(path) and path.suffix.lower() != ".txt":
        raise DataError(
            f"{path}: the name does not tell what the file holds. Write `format: text` if each such file is one document; "
            f"records are read from JSON lines, named {', '.join(JSON_LINES)}."
        )
    fitting = fitting_formats(keys)
    if len(fitting) == 1:
        return fitting[0]
    shown = ", ".join(f"`{key[:40]}`" for key in keys[:8]) or "none"
    if fitting:
        raise DataError(
            f"{path}: the first record fits {len(fitting)} formats, {' and '.join(fitting)} (its keys: {shown}). "
            f"Say which one is meant: `format: {fitting[-1]}`."
        )
    raise DataError(
        f"{path}: the keys of the first record ({shown}) are those of no format. Use `text`; `messages`; "
        "`prompt` and `response` or `completion`; or `instruction`, `output` and perhaps `input`."
    )


def _check_stage(path: str, format: Format, stage: Stage) -> None:
    needed = FORMATS[format].stage
    if needed == stage:
        return
    if stage == "pretrain":
        raise DataError(
            f"{path}: format {format} holds conversations, but train.stage = pretrain trains on every token of a text. "
            'Write train.stage=sft, or give records like {"text": ...}.'
        )
    raise DataError(
        f"{path}: format text has no assistant turns, but train.stage = sft trains on those only. "
        'Write train.stage=pretrain, or give records like {"prompt": ..., "response": ...}.'
    )


def _read_records(path: Path, problems: Problems) -> Iterator[tuple[int, Record]]:
    try:
        if _is_json_lines(path):
            yield from _read_json_lines(path, problems)
        else:
            yield from _read_document(path, problems)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror} ({path.absolute()}).") from None


def _read_document(path: Path, problems: Problems) -> Iterator[tuple[int, Record]]:
    raw = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    if not raw.strip():
        problems.add(str(path), "the file is empty; fill it or leave it out of the source")
    elif b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        problems.add(f"{path}:{line}", "a NUL byte; is this UTF-16 or no text at all? Save the file as UTF-8")
    else:
        size = path.stat().st_size - len(raw)
        document = _decode(raw, path, line=1, offset=size, problems=problems)
        if document is not None:
            yield 1, {"text": document}


def _read_json_lines(path: Path, problems: Problems) -> Iterator[tuple[int, Record]]:
    offset, last_filled, blank = 0, 0, None
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            start, offset = offset, offset + len(raw)
            if line == 1 and raw.startswith(_BYTE_ORDER_MARK):
                raw, start = raw[len(_BYTE_ORDER_MARK) :], start + len(_BYTE_ORDER_MARK)
            if not raw.strip():
                blank = blank or line
                continue
            if blank is not None:  # only now is it known not to stand at the end
                problems.add(f"{path}:{blank}", "a blank line between records; there is one JSON object a line, remove it")
                blank = None
            last_filled = line
            record = _parse(raw, path, line, start, problems)
            if record is not None:
                yield line, record
    if not last_filled:
        problems.add(str(path), "the file is empty; fill it or leave it out of the source")


def _parse(raw: bytes, path: Path, line: int, offset: int, problems: Problems) -> Record | None:
    where = f"{path}:{line}"
    decoded = _decode(raw, path, line=line, offset=offset, problems=problems)
    if decoded is None:
        return None
    try:
        record = json.loads(
            decoded.rstrip(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite
        )
    except BadRecordError as error:
        problems.add(where, str(error))
    except json.JSONDecodeError as error:
        problems.add(where, f"not valid JSON ({error.msg}, column {error.colno}); write one JSON object a line")
    except RecursionError:
        problems.add(where, "nested too deeply for a record; is this the right file?")
    except ValueError as error:  # an integer of thousands of digits
        problems.add(where, f"a number that cannot be read ({error}); shorten it")
    else:
        if isinstance(record, dict):
            return record
        kind = "a list" if isinstance(record, list) else "a single value"
        problems.add(where, f"the line is {kind}; write one JSON object a line, as `jq -c '.[]'` makes of a list")
    return None


def _decode(raw: bytes, path: Path, *, line: int, offset: int, problems: Problems) -> str | None:
    """The bytes as text. `offset` is where in the file they start, `line` the line they start on."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_line = line + raw.count(b"\n", 0, error.start)
        what = f"byte {offset + error.start} of the file (0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        problems.add(f"{path}:{bad_line}", what)
        return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRecordError(f"the key `{twice[:40]}` stands twice in one object; remove one of them")
    return record


def _refuse_constant(name: str) -> Any:
    raise BadRecordError(f"{name} is no JSON value; write a finite number or null")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadRecordError(f"{digits[:40]} is too large for a number; write a finite number or null")
    return value
