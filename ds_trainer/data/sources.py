"""Find the files of a source, and decide how they are read and what a record of them is."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ds_trainer.arguments.schema import Source
from ds_trainer.data.chunks import BadRecord, Record
from ds_trainer.data.formats import FORMATS, Format, Stage, fitting_formats, records_of
from ds_trainer.data.readers import Kind, check_magic, json_kind, parse_chunk, read_chunks
from ds_trainer.errors import DataError

Report = Callable[[str], None]
"""Takes one line meant for the user."""

_KINDS: dict[str, Kind] = {
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".bin": "tokens",
    ".idx": "tokens",
}
_PACKED_SUFFIXES = (".gz", ".zst")
_PACKABLE = ("json_lines", "json", "csv", "text")
_NAMES = "JSON lines (.jsonl, .ndjson), JSON (.json), .csv, .parquet or .arrow; text may also end in .gz or .zst"
_MAX_BAD_AT_START = 100
"""So many bad records before the first good one are no accident."""
_HUB_TIMEOUT_SECONDS = 5


@dataclass(frozen=True, slots=True)
class FoundSource:
    """The files of one source, and how to read them. Picklable."""

    source: Source
    """As in the run file."""
    files: tuple[Path, ...]
    """Sorted; relative if the run file's path is. Of pre-tokenised data, the index (.idx) of each corpus."""
    kind: Kind
    """How the files are read, all of them the same way."""
    format: Format
    """What a record is; never `auto`."""


def find_sources(sources: Sequence[Source], stage: Stage, report: Report) -> list[FoundSource]:
    """Find the files of every source and decide how each source is read.

    Args:
        sources: as the run file has them; paths are relative to the current folder.
        stage: `pretrain` needs texts, `sft` conversations, the others pairs of answers.
        report: is told the format of each source, and which keys of its records are not used.

    Raises:
        DataError: no such file or data set, a file that is not what its name says, an unknown format, or one that the
            stage cannot train on.
    """
    found = []
    for source in sources:
        files = _find_files(source)
        kind = _common_kind(source, files)
        if kind == "tokens":
            found.append(_find_tokens(source, files, stage, report))
            continue
        if source.format == "tokens":
            raise DataError(
                f"{files[0]}: format tokens is read from the .idx and .bin of a Megatron corpus. Name one of those."
            )
        for file in files:
            check_magic(file, kind)
        keys = _first_keys(FoundSource(source, files, kind, "text"))
        _check_fields(source, files[0], keys)
        renamed = list(rename(dict.fromkeys(keys), source.fields))
        format = _detect_format(files[0], renamed) if source.format == "auto" else source.format
        _check_stage(source.path, format, stage)
        if kind == "text" and format != "text":
            raise DataError(
                f"{files[0]}: format {format} is read from {_NAMES}. Convert it to {files[0].with_suffix('.jsonl')}."
            )
        foreign = [key for key in source.fields if key not in FORMATS[format].keys]
        if foreign:
            raise DataError(
                f"{source.path}: `fields` maps to `{foreign[0]}`, which format {format} does not read; "
                f"it reads {', '.join(sorted(FORMATS[format].keys))}."
            )
        if source.format != "auto":
            how = "as stated"
        else:
            how = "one document a file" if kind == "text" else "by the keys of its first record"
        read = {source.fields.get(key, key) for key in FORMATS[format].keys}
        unused = sorted(key for key in keys if key not in read)
        ignored = f"; not used: {', '.join(unused)}" if unused else ""
        report(f"{source.path}: {_count(files)}, format {format} ({how}){ignored}")
        found.append(FoundSource(source, files, kind, format))
    return found


def rename(record: Record, fields: Mapping[str, str]) -> Record:
    """The record with the format's keys in place of its own.

    A record that lacks a mapped key lacks the format's key too, even if it has one of that name: nothing is guessed.

    Args:
        record: as read.
        fields: the format's key -> the record's.
    """
    if not fields:
        return record
    kept = {key: value for key, value in record.items() if key not in fields and key not in fields.values()}
    return kept | {key: record[own] for key, own in fields.items() if own in record}


def _find_files(source: Source) -> tuple[Path, ...]:
    path = source.path
    if os.path.isdir(path):
        return _files_of_saved(source)
    # A path that exists is meant literally, even if it holds brackets or stars; Megatron's tools name a corpus by its stem.
    literal = next((name for name in (path, f"{path}.idx") if os.path.isfile(name)), None)
    names = [literal] if literal else sorted(glob.glob(path, recursive=True))
    files = tuple(Path(name) for name in names if os.path.isfile(name))
    if not files and _may_be_hub_id(path):
        return _files_of_hub(source)
    if not files:
        raise DataError(
            f"{path}: matches no file ({os.path.abspath(path)}). Paths are relative to the current folder; "
            "correct the path, or write an absolute one."
        )
    for key, value in (("split", source.split), ("subset", source.subset)):
        if value is not None:
            raise DataError(
                f"{path}: `{key}: {value}` is for a folder of `datasets` or a hub id, and this is a file. Remove it."
            )
    return files


def _glob_for(folder: Path) -> str:
    """What to write for the files of a folder: a pattern that matches some of them where it holds any data."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    suffixes = ["".join(Path(name).suffixes[-2:]) if name.endswith(_PACKED_SUFFIXES) else Path(name).suffix for name in names]
    known = [suffix for suffix in suffixes if suffix.removesuffix(".gz").removesuffix(".zst") in _KINDS]
    [(most, _)] = Counter(known or [".jsonl"]).most_common(1)
    return os.path.join(folder, f"*{'.idx' if most == '.bin' else most}")


def _files_of_saved(source: Source) -> tuple[Path, ...]:
    """The Arrow files of a folder that `save_to_disk` wrote, in their order."""
    folder = Path(source.path)
    if source.subset is not None:
        raise DataError(f"{folder}: `subset: {source.subset}` is for a hub id, and this is a folder. Remove it.")
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits", [])
        if source.split not in splits:
            wanted = "without `split`" if source.split is None else f"`split: {source.split}`"
            raise DataError(
                f"{folder}: {wanted}, but the folder holds the splits {', '.join(splits)}. Write `split: {splits[0]}`."
            )
        folder /= str(source.split)
    elif not (folder / "state.json").is_file():
        raise DataError(
            f"{folder}: is a folder, but not one that `datasets` saved (`save_to_disk`), and other sources are files or globs. "
            f"Write {_glob_for(folder)}."
        )
    elif source.split is not None and source.split != _read_json(folder / "state.json").get("_split"):
        raise DataError(f"{folder}: `split: {source.split}`, but the folder holds a single data set. Remove `split`.")
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: holds a selection of rows by index. Call `flatten_indices()` before `save_to_disk`.")
    files = tuple(folder / each["filename"] for each in state.get("_data_files", []))
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{folder}: {missing[0] if missing else 'every data file'} is missing; copy the whole folder.")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the data set again with `save_to_disk`.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is no JSON object; save the data set again with `save_to_disk`.")
    return content


def _may_be_hub_id(path: str) -> bool:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path, re.ASCII) or os.path.isdir(path.split("/")[0]):
        return False
    return _kind_of(Path(path)) is None and Path(path).suffix not in (".gz", ".zst")


def _files_of_hub(source: Source) -> tuple[Path, ...]:
    """The Arrow files that `datasets` makes of a data set of the hub, in its cache."""
    split = source.split or "train"
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise DataError(f"{source.path}: `split: {split}` is an expression; name one split, and take less with `max_samples`.")
    _check_hub(source.path)
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source.path}: is no file here, so it is taken for a hub id, and that needs the package `datasets`. "
            "Run `pip install datasets`, or correct the path."
        ) from None
    try:
        loaded = datasets.load_dataset(source.path, name=source.subset, split=split)
    except datasets.exceptions.DatasetNotFoundError:
        raise DataError(
            f"{source.path}: no file here, and no data set on the hub that may be read. Correct the path or the id; "
            "log in with `hf auth login` if it is private or gated."
        ) from None
    except Exception as error:  # whatever its many builders raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise DataError(
            f"{source.path}: `datasets` cannot load it (subset {source.subset}, split {split}): {what}. "
            "Correct the path if a file is meant, else `subset` or `split`; or give a folder that `save_to_disk` wrote."
        ) from None
    files = tuple(Path(each["filename"]) for each in loaded.cache_files)
    if not files:
        raise DataError(
            f"{source.path}: `datasets` keeps split {split} in no file; save it with `save_to_disk`, give the folder."
        )
    return files


def _check_hub(path: str) -> None:
    """One short request: the libraries would try for minutes. With HF_HUB_OFFLINE only the cache counts, and it is fast."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:  # of whichever HTTP library is behind the session
        raise DataError(
            f"{path}: no such file ({os.path.abspath(path)}), and as a hub id it cannot be loaded: {constants.ENDPOINT} "
            f"does not answer ({type(error).__name__}: {str(error)[:200]}). Correct the path if a file is "
            "meant; else load the data set where there is a network, save it with `save_to_disk`, and give that folder."
        ) from None


def _kind_of(path: Path) -> Kind | None:
    """How a file of this name is read; None if the name does not tell."""
    suffix = path.suffix.lower()
    if suffix not in (".gz", ".zst"):
        return _KINDS.get(suffix)
    kind = _KINDS.get(Path(path.stem).suffix.lower())
    return kind if kind in _PACKABLE else None


def _common_kind(source: Source, files: Sequence[Path]) -> Kind:
    first: Kind | None = None
    for file in files:
        kind = _kind_of(file)
        if kind == "json":
            kind = json_kind(file)
        if kind is None:
            if source.format not in ("text", "tokens"):
                stated = f"format {source.format} is read" if source.format != "auto" else "records are read"
                raise DataError(
                    f"{file}: the name does not tell what the file holds. Write `format: text` if each such file is one "
                    f"document; {stated} from {_NAMES}."
                )
            kind = "text"
        first = first or kind
        if kind != first:
            raise DataError(
                f"{source.path}: {files[0]} is read as {first} and {file} as {kind}; the files of a source are read the "
                "same way. Make them two sources."
            )
    assert first is not None
    return first


def _find_tokens(source: Source, files: Sequence[Path], stage: Stage, report: Report) -> FoundSource:
    """A pre-tokenised corpus: an .idx and a .bin, of which either may be named."""
    if source.format not in ("auto", "tokens"):
        raise DataError(f"{files[0]}: holds tokens, not records of format {source.format}. Write `format: tokens`.")
    if source.fields:
        raise DataError(f"{files[0]}: holds tokens, which have no keys. Remove `fields`.")
    if stage != "pretrain":
        raise DataError(f"{files[0]}: tokens have no assistant turns, but train.stage = {stage}. Write train.stage=pretrain.")
    indices = tuple(dict.fromkeys(file.with_suffix(".idx") for file in files))
    for index in indices:
        for file in (index, index.with_suffix(".bin")):
            if not file.is_file():
                raise DataError(f"{file}: is missing; a corpus of tokens is an .idx and a .bin side by side. Copy both.")
        check_magic(index, "tokens")
    report(f"{source.path}: {_count(indices)}, format tokens ({'by its name' if source.format == 'auto' else 'as stated'})")
    return FoundSource(source, indices, "tokens", "tokens")


def _first_keys(found: FoundSource) -> list[str]:
    """The keys of the first readable record: bad ones before it are reported when the files are read as a whole."""
    bad: list[BadRecord] = []
    for each in chain.from_iterable(parse_chunk(chunk) for chunk in read_chunks(found)):
        if not isinstance(each, BadRecord):
            return list(each[1])
        bad.append(each)
        if len(bad) == _MAX_BAD_AT_START:
            break
    head = f"{len(bad)} bad {'record' if len(bad) == 1 else 'records'} and no good one; nothing was started."
    raise DataError("\n".join([f"{found.source.path}: {head}", *(f"  {each}" for each in bad[:5])]))


def _check_fields(source: Source, path: Path, keys: Sequence[str]) -> None:
    known = sorted(set().union(*(rule.keys for rule in FORMATS.values())))
    for key, own in source.fields.items():
        if source.format == "auto" and key not in known:
            raise DataError(f"{source.path}: `fields` maps to `{key}`, which no format reads; they read {', '.join(known)}.")
        if own not in keys:
            near = difflib.get_close_matches(own, keys, 1, 0.0)
            meant = f"; is `{near[0]}` meant?" if near else "."
            raise DataError(
                f"{path}: `fields` takes `{key}` from `{own}`, which the first record lacks (found: {_shown(keys)}){meant}"
            )


def _detect_format(path: Path, keys: Sequence[str]) -> Format:
    fitting = fitting_formats(keys)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(
            f"{path}: the first record fits {len(fitting)} formats, {' and '.join(fitting)} (its keys: {_shown(keys)}). "
            f"Say which one is meant: `format: {fitting[-1]}`."
        )
    raise DataError(
        f"{path}: the keys of the first record ({_shown(keys)}) are those of no format. Use `text`; `messages`; "
        "`conversations`; `prompt` and `response` or `completion`; or `instruction` and `output`. Or say with `fields` which "
        "key is which, as in `fields: {text: content}`."
    )


def _check_stage(path: str, format: Format, stage: Stage) -> None:
    needed = FORMATS[format].stage
    if needed == records_of(stage):
        return
    if stage == "pretrain" and needed == "sft":
        raise DataError(
            f"{path}: format {format} holds conversations, but train.stage = pretrain trains on every token of a text. "
            'Write train.stage=sft, or give records like {"text": ...}.'
        )
    if stage == "sft" and needed == "pretrain":
        raise DataError(
            f"{path}: format text has no assistant turns, but train.stage = sft trains on those only. "
            'Write train.stage=pretrain, or give records like {"prompt": ..., "response": ...}.'
        )
    if records_of(stage) == "preference":
        raise DataError(
            f"{path}: format {format} holds no pairs of answers, and train.stage = {stage} compares the two of a pair. "
            'Give records like {"prompt": ..., "chosen": ..., "rejected": ...}.'
        )
    if stage == "kto":
        raise DataError(
            f"{path}: format {format} holds no labelled answers, and train.stage = kto needs them. "
            'Give records like {"prompt": ..., "completion": ..., "label": true}.'
        )
    if needed == "preference":
        raise DataError(
            f"{path}: format {format} holds pairs of answers, but train.stage = {stage}. Write train.stage=dpo (or reward, "
            "orpo, simpo), or give the answers to imitate as prompt_response or messages."
        )
    raise DataError(
        f"{path}: format {format} holds labelled answers, but train.stage = {stage}. Write train.stage=kto, or give the "
        "answers to imitate as prompt_response or messages."
    )


def _shown(keys: Sequence[str]) -> str:
    return ", ".join(f"`{key[:40]}`" for key in keys[:8]) or "none"


def _count(files: Sequence[Path]) -> str:
    return f"{len(files)} {'file' if len(files) == 1 else 'files'}"
