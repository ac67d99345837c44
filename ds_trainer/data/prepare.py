"""From the run file's sources to rows that can be read: find, tokenise, cut, pack, each kept for the next start."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_trainer.arguments.schema import DataSection, Source
from ds_trainer.data.cache import (
    Tokens,
    build_once,
    describe_file,
    fingerprint,
    open_rows,
    open_tokens,
    write_rows,
    write_tokens,
)
from ds_trainer.data.loader import TokenRows
from ds_trainer.data.pack import Overlong, count_targets, cut_documents, one_row_each, pack
from ds_trainer.data.render import adds_bos, effective_chat_template
from ds_trainer.data.sources import FoundSource, Problems, Report, Sample, Stage, find_sources, read_samples
from ds_trainer.data.tokenize import Document, backend_json, tokenize_conversations, tokenize_texts
from ds_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_VERSION = 1
"""Raise it when the same files give other tokens or another layout: every cache is then built anew."""
ROWS_VERSION = 1
"""Raise it when the same tokens give other rows."""


def prepare_rows(
    data: DataSection,
    sources: Sequence[Source],
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    cache_folder: Path,
    report: Report,
    head_start: float = 0.0,
) -> TokenRows:
    """Tokenise and pack the sources, or open what an earlier start has made of them.

    Every rank may call it at once, before there is a process group: one does the work, the others wait for its files.

    Args:
        data: packing, overlong and chat_template are read; the sources are given apart, so that held-out data can be too.
        sources: `data.sources` or `evaluate.sources`.
        stage: `train.stage`.
        tokenizer: a fast tokenizer, already loaded.
        seq_len: positions in a row, padding included.
        cache_folder: created if it is missing.
        report: takes lines for the user: formats, progress, a summary.
        head_start: seconds that another process is given to begin the work; see `cache.head_start_of`.

    Raises:
        DataError: missing or bad data, or nothing left to train on.
        ModelError: the tokenizer is a slow one.
    """
    found = find_sources(sources, stage, report)
    template = effective_chat_template(tokenizer, data.chat_template) if stage == "sft" else None
    tokens_folder, tokens_meta = _prepare_tokens(found, stage, tokenizer, template, cache_folder, report, head_start)
    tokens = open_tokens(tokens_folder, tokens_meta["dtype"])

    overlong: Overlong = data.overlong or ("split" if stage == "pretrain" else "truncate")
    settings = {"seq_len": seq_len, "packing": data.packing, "overlong": overlong}
    rows_key = fingerprint({"version": ROWS_VERSION, "tokens": tokens_folder.name} | settings)
    rows_folder = cache_folder / f"rows_{rows_key}"
    rows_meta = build_once(
        rows_folder,
        lambda folder: settings | _build_rows(folder, tokens, seq_len=seq_len, packing=data.packing, overlong=overlong),
        what="rows",
        report=report,
        head_start=head_start,
    )
    report(_summary(tokens_meta, rows_meta))
    return TokenRows(
        tokens=tokens,
        plan=open_rows(rows_folder),
        seq_len=seq_len,
        num_tokens=rows_meta["tokens"],
        num_targets=rows_meta["targets"],
        max_token_id=tokens_meta["max_token_id"],
    )


def _prepare_tokens(
    found: Sequence[FoundSource],
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    cache_folder: Path,
    report: Report,
    head_start: float,
) -> tuple[Path, dict[str, Any]]:
    files = {path: describe_file(path) for source in found for path in source.files}
    # Not the paths: the same content elsewhere gives the same tokens.
    contents = [
        {"format": source.format, "files": [(path.suffix, files[path]["sha256"]) for path in source.files]} for source in found
    ]
    key = fingerprint(
        {
            "version": TOKENS_VERSION,
            "stage": stage,
            "sources": contents,
            "tokenizer": _tokenizer_fingerprint(tokenizer),
            "template": template,
        }
    )
    folder = cache_folder / f"tokens_{key}"

    def build(target: Path) -> Mapping[str, Any]:
        report(f"tokenising {len(files)} {'file' if len(files) == 1 else 'files'} into {folder}")
        dtype = "uint16" if max(tokenizer.get_vocab().values()) < 1 << 16 else "uint32"
        problems = Problems()
        samples = chain.from_iterable(read_samples(source, problems) for source in found)
        counts = write_tokens(target, _tokenize(samples, tokenizer, template, problems, report), dtype)
        problems.raise_if_any()
        for path, before in files.items():
            if not _is_unchanged(path, before):
                raise DataError(f"{path}: changed while it was read. Start again when nothing writes to it.")
        return counts | {
            "dtype": dtype,
            "stage": stage,
            "version": TOKENS_VERSION,
            "formats": [source.format for source in found],
            "tokenizer": _tokenizer_fingerprint(tokenizer),
            "sources": list(files.values()),
        }

    return folder, build_once(folder, build, what="tokens", report=report, head_start=head_start)


def _is_unchanged(path: Path, before: Mapping[str, Any]) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (before["bytes"], before["mtime_ns"])


def _tokenize(
    samples: Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    problems: Problems,
    report: Report,
) -> Iterable[Document]:
    if template is None:
        return tokenize_texts(samples, tokenizer, report)
    return tokenize_conversations(samples, tokenizer, template, problems, report)


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = hashlib.sha256(backend_json(tokenizer).encode()).hexdigest()
    return fingerprint([backend, dict(tokenizer.special_tokens_map), adds_bos(tokenizer)])


def _build_rows(folder: Path, tokens: Tokens, *, seq_len: int, packing: bool, overlong: Overlong) -> dict[str, Any]:
    cut = cut_documents(np.diff(tokens.offsets), seq_len, overlong)
    targets = count_targets(cut.segments, tokens.offsets, tokens.spans, tokens.span_offsets)
    segments = cut.segments.take(targets > 0)
    without_target = len(targets) - len(segments.length)
    if not len(segments.length):
        empty = (np.diff(tokens.offsets) == 0).sum()
        raise DataError(
            f"no row is left to train on: of {len(tokens.offsets) - 1:,} documents {cut.overlong_documents:,} are longer than "
            f"seq_len {seq_len:,} (overlong: {overlong}), {empty:,} are empty, and {without_target:,} pieces have no token to "
            "predict. Give records with longer texts or answers, or raise data.seq_len."
        )
    rows = pack(segments, seq_len) if packing else one_row_each(segments)
    write_rows(folder, rows)
    return {
        "version": ROWS_VERSION,
        "rows": rows.num_rows,
        "tokens": int(segments.length.sum()),
        "targets": int(targets.sum()),
        "overlong_documents": cut.overlong_documents,
        "lost_tokens": cut.lost_tokens,
        "without_target": without_target,
    }


def _summary(tokens: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    done = {"truncate": "truncated", "split": "split", "drop": "dropped"}[rows["overlong"]]
    lost = f" ({rows['lost_tokens']:,} tokens lost)" if rows["lost_tokens"] else ""
    fill = rows["tokens"] / (rows["rows"] * rows["seq_len"])
    return (
        f"{tokens['documents']:,} documents of {tokens['tokens']:,} tokens: {rows['rows']:,} rows of {rows['seq_len']:,}, "
        f"{fill:.1%} filled, {rows['targets'] / rows['tokens']:.1%} of the tokens trained; "
        f"{rows['overlong_documents']:,} overlong {done}{lost}, {rows['without_target']:,} dropped without a target"
    )
