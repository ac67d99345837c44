"""From the run file's sources to rows that can be read: find, tokenise, cut, pack, each kept for the next start."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import accumulate, islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ds_trainer import faults
from ds_trainer.arguments.schema import DataSection, Source
from ds_trainer.data.cache import build_once, describe_files, fingerprint
from ds_trainer.data.chunks import MARGIN_COUNT, BadRecord, Chunk, TokenizedChunk
from ds_trainer.data.formats import FORMATS, Stage, documents_of
from ds_trainer.data.lease import Lease
from ds_trainer.data.pack import Overlong
from ds_trainer.data.readers import read_chunks
from ds_trainer.data.render import effective_chat_template
from ds_trainer.data.rows import Pool, TokenRows, fingerprint_of, write_rows
from ds_trainer.data.sources import FoundSource, Report, find_sources
from ds_trainer.data.store import StoreWriter, TokenStore, bring_corpus
from ds_trainer.data.tokenize import Recipe, make_recipe
from ds_trainer.data.workers import all_cores, tokenize_in_order
from ds_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_VERSION = 2
"""Raise it when the same files give other tokens or another layout: every cache is then built anew."""
ROWS_VERSION = 3
"""Raise it when the same tokens give other rows."""

SHOWN_PROBLEMS = 5
LISTED_PROBLEMS = 10_000
"""Bad records that are written down one by one; the rest is counted."""
_EARLY_VERDICT_RECORDS = 10_000
_KEEP_SECONDS = 5.0
"""How often the work is brought to the disk so far that a killed start can go on from there."""
_SAY_SECONDS = 5.0
_PROGRESS = "progress.json"

Show = Callable[[float, str], None]
"""Takes how much is done, 0 to 1, and a line about it."""


@dataclass(slots=True)
class Tally:
    """What has become of the records of a source so far. JSON in its fields."""

    chunks: int = 0
    read: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    max_token_id: int = -1
    bad: int = 0
    bad_by_reason: dict[str, int] = field(default_factory=dict)
    bad_records: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    together: int = 1
    """Documents of a record."""
    lengths: list[int] = field(default_factory=lambda: [0] * 32)
    """Documents of 1 token, of 2 to 3, of 4 to 7, ..."""
    files_read: list[dict[str, Any]] = field(default_factory=list)
    """`path` and `first_document` of each file."""

    def seen(self, path: str) -> dict[str, Any]:
        """What `judge` takes; unlike `asdict` it copies no lists, which may be long."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"path": path}

    def add(self, path: str, chunk: TokenizedChunk) -> None:
        """Count a chunk of a file."""
        if not self.files_read or self.files_read[-1]["path"] != path:
            self.files_read.append({"path": path, "first_document": self.documents})
        self.chunks += 1
        self.read += chunk.read
        self.documents += len(chunk.lengths)
        self.tokens += len(chunk.tokens)
        spans = chunk.spans
        self.trained_tokens += len(chunk.tokens) if spans is None else int((spans[:, 1] - spans[:, 0]).sum())
        self.max_token_id = max(self.max_token_id, int(chunk.tokens.max(initial=0)) if len(chunk.tokens) else -1)
        self.bad += len(chunk.bad)
        for each in chunk.bad:
            self.bad_by_reason[each.reason] = self.bad_by_reason.get(each.reason, 0) + 1
        self.bad_records += [asdict(each) for each in chunk.bad[: LISTED_PROBLEMS - len(self.bad_records)]]
        self.counts = dict(Counter(self.counts) + Counter(chunk.counts))
        if len(chunk.lengths):
            buckets = np.bincount(np.log2(chunk.lengths).astype(int), minlength=32)
            self.lengths = [old + new for old, new in zip(self.lengths, buckets.tolist(), strict=True)]


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
    workers: int | None = None,
    show: Show | None = None,
    all_problems: bool = False,
) -> TokenRows:
    """Tokenise and pack the sources, or open what an earlier start has made of them.

    Every rank may call it at once, before there is a process group: one does the work, the others wait for its files.

    Args:
        data: how records become rows; the sources are given apart, so that held-out data can be too.
        sources: `data.sources` or `evaluate.sources`.
        stage: `train.stage`.
        tokenizer: a fast tokenizer, already loaded.
        seq_len: positions in a row, padding included.
        cache_folder: created if it is missing.
        report: takes lines for the user: formats, progress, a summary.
        head_start: seconds that another process is given to begin the work; see `cache.head_start_of`.
        workers: processes that tokenise; by default one for each core.
        show: takes the progress instead of `report`, as often as it comes.
        all_problems: read to the end and leave the verdict on bad records to the caller: `judge`.

    Raises:
        DataError: missing or bad data, or nothing left to train on.
        ModelError: the tokenizer is a slow one.
    """
    found = find_sources(sources, stage, report)
    recipes = recipes_of(found, data, stage, tokenizer, report)
    described = describe_files([path for source in found for path in _content_of(source)], cache_folder / "files.json")
    by_path = {each["path"]: each for each in described}
    build = partial(
        _prepare_store,
        data=data,
        cache_folder=cache_folder,
        report=report,
        head_start=head_start,
        workers=all_cores() if workers is None else workers,
        show=show,
        all_problems=all_problems,
    )
    stores = [
        build(source, recipe, [by_path[str(path)] for path in _content_of(source)])
        for source, recipe in zip(found, recipes, strict=True)
    ]

    weights = tuple(source.source.weight for source in found if source.source.weight is not None)
    pooled = [[store] for store in stores] if weights else [stores]
    pools = [_prepare_pool(each, data, stage, seq_len, cache_folder, report, head_start) for each in pooled]
    rows = TokenRows(
        pools=tuple(pools),
        weights=weights if len(pools) > 1 else (),
        seq_len=seq_len,
        num_tokens=sum(pool.meta["tokens"] for pool in pools),
        num_targets=sum(pool.meta["targets"] for pool in pools),
        max_token_id=max(store.meta["max_token_id"] for store in stores),
        fingerprint=fingerprint_of(pools, weights, seq_len),
    )
    report(summary(rows))
    return rows


def recipes_of(
    found: Sequence[FoundSource], data: DataSection, stage: Stage, tokenizer: PreTrainedTokenizerBase, report: Report
) -> list[Recipe]:
    """How the records of each source become tokens."""
    if stage == "pretrain" and tokenizer.eos_token_id is None:
        report("the tokenizer has no end-of-text token: documents end without one")
    if stage != "pretrain":
        own = "the tokenizer's" if tokenizer.chat_template is not None else "plain, since the tokenizer has none"
        report(f"chat template: {data.chat_template or own}")
    template = effective_chat_template(tokenizer, data.chat_template) if stage != "pretrain" else None
    return [
        make_recipe(
            tokenizer,
            format=source.format,
            fields=source.source.fields,
            stage=stage,
            template=template,
            train_on=data.train_on,
            seq_len=data.seq_len,
        )
        for source in found
    ]


def overlong_of(data: DataSection, stage: Stage) -> Overlong:
    """What happens to a sample longer than a row: as the run file says, or by default of the stage."""
    if documents_of(stage) == 2:
        return "drop"  # a cut answer is not the one that was judged
    return data.overlong or ("split" if stage == "pretrain" else "truncate")


def _content_of(source: FoundSource) -> list[Path]:
    """All files that decide what a source holds; of a corpus of tokens, the tokens too."""
    if source.kind != "tokens":
        return list(source.files)
    return [path for index in source.files for path in (index, index.with_suffix(".bin"))]


def _prepare_store(
    source: FoundSource,
    recipe: Recipe,
    files: list[dict[str, Any]],
    *,
    data: DataSection,
    cache_folder: Path,
    report: Report,
    head_start: float,
    workers: int,
    show: Show | None,
    all_problems: bool,
) -> TokenStore:
    key = fingerprint(
        {
            "version": TOKENS_VERSION,
            # Not the paths: the same content elsewhere gives the same tokens.
            "files": [("".join(Path(each["path"]).suffixes), each["sha256"]) for each in files],
            "kind": source.kind,
            "max_samples": source.source.max_samples,
            "recipe": recipe.fingerprint_parts(),
            **({"margins": 1} if recipe.stage == "reward" else {}),  # caches of before have none
        }
    )
    folder = cache_folder / f"tokens_{key}"

    def build(target: Path, lease: Lease) -> Mapping[str, Any]:
        report(f"tokenising {source.source.path} into {folder}")
        faults.point("tokenising")
        sizes = dict.fromkeys(map(str, source.files), 0)
        for each in files:
            path = each["path"]
            sizes[path if path in sizes else str(Path(path).with_suffix(".idx"))] += each["bytes"]
        meter = Meter(report, show, lease, sizes=sizes)
        limit = None if all_problems else data
        tally = _fill(target, source, recipe, workers, data.timeout_seconds, meter, limit)
        for each in files:
            if not _is_unchanged(each):
                raise DataError(f"{each['path']}: changed while it was read. Start again when nothing writes to it.")
        return asdict(tally) | {"dtype": recipe.dtype, "format": source.format, "path": source.source.path}

    build_once(folder, build, what="tokens", report=report, head_start=head_start)
    store = TokenStore(folder)
    if not all_problems or not store.num_documents:
        judge(store.meta, data, so_far=False)
    return store


def _fill(
    target: Path,
    source: FoundSource,
    recipe: Recipe,
    workers: int,
    timeout_seconds: float,
    meter: Meter,
    limit: DataSection | None,
) -> Tally:
    """Tokenise a source into a store; goes on where a killed builder had come to."""
    tally, sizes = _taken_up(target)
    if tally.chunks:
        meter.take_up(tally)
    tally.together = 2 if FORMATS[recipe.format].stage in ("preference", "kto") else 1
    writer = StoreWriter(target, sizes)
    kept = time.monotonic()
    try:
        for path, done, chunk in _tokenized(source, recipe, workers, timeout_seconds, tally.chunks):
            wanted = None if source.source.max_samples is None else source.source.max_samples * tally.together
            if wanted is not None and tally.documents + len(chunk.lengths) >= wanted:
                chunk = chunk.head(wanted - tally.documents, tally.together)
            writer.append(chunk)
            tally.add(path, chunk)
            meter.move(tally, path, done)
            if limit is not None:
                judge(tally.seen(source.source.path), limit, so_far=True, patience=SHOWN_PROBLEMS)
            if tally.documents == wanted:
                break
            if time.monotonic() - kept > _KEEP_SECONDS:
                _keep(target, tally, writer.sync())
                kept = time.monotonic()
        writer.finish(recipe.dtype)
    finally:
        writer.close()
    (target / _PROGRESS).unlink(missing_ok=True)
    return tally


def _tokenized(
    source: FoundSource, recipe: Recipe, workers: int, timeout_seconds: float, skip: int
) -> Iterator[tuple[str, float, TokenizedChunk]]:
    """The chunks of a source from number `skip` on: path, how much of the file is read, tokens."""
    if source.kind == "tokens":
        for path in source.files:
            for chunk, done in bring_corpus(path, recipe.dtype):
                if skip > 0:
                    skip -= 1
                else:
                    yield str(path), done, chunk
        return
    chunks: Iterable[Chunk] = islice(read_chunks(source), skip, None)
    for read, chunk in tokenize_in_order(chunks, recipe, workers=workers, timeout_seconds=timeout_seconds):
        yield read.path, read.done, chunk


def _taken_up(target: Path) -> tuple[Tally, dict[str, int]]:
    """How far a killed builder had come; whatever else it left is removed."""
    try:
        kept = json.loads((target / _PROGRESS).read_text(encoding="utf-8"))
        sizes = kept["sizes"]
        if all((target / name).stat().st_size >= size for name, size in sizes.items()):
            return Tally(**kept["tally"]), sizes
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(target)
    target.mkdir()
    return Tally(), {}


def _keep(target: Path, tally: Tally, sizes: Mapping[str, int]) -> None:
    temporary = target / f"{_PROGRESS}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"tally": asdict(tally), "sizes": sizes}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(target / _PROGRESS)


def _is_unchanged(before: Mapping[str, Any]) -> bool:
    try:
        status = os.stat(before["path"])
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (before["bytes"], before["mtime_ns"])


def judge(tally: Mapping[str, Any], data: DataSection, *, so_far: bool, patience: int = 1) -> None:
    """Refuse a source whose records are worse than `data` allows.

    Args:
        tally: a `Tally` as JSON, and the `path` of the source.
        data: what is allowed.
        so_far: there is more to come.
        patience: with `on_bad_record: error`, how many bad records are shown together.

    Raises:
        DataError: with the first bad records.
    """
    bad, read = tally["bad"], tally["read"]
    if data.on_bad_record == "error":
        if bad >= patience:
            enough = "" if bad <= data.max_bad_fraction * read else f" data.max_bad_fraction={ceil(100 * bad / read) / 100}"
            if so_far or bad < read:
                _refuse(tally, f"Mend {_them(bad)}, or leave {_them(bad)} out with data.on_bad_record=skip{enough}")
            _refuse(tally, f"Mend {_them(bad)}: no record is good")
    elif bad > data.max_bad_fraction * read and (not so_far or read >= _EARLY_VERDICT_RECORDS):
        _refuse(
            tally,
            f"That is {bad / max(1, read):.2%} of the {read:,} records{' read so far' if so_far else ''}, and "
            f"data.max_bad_fraction allows {data.max_bad_fraction:.2%}. Mend {_them(bad)}, or raise the limit",
        )
    if not so_far and not tally["documents"]:
        why = ", ".join([*filter(None, [_reasons(tally)]), *(f"{count:,} {what}" for what, count in tally["counts"].items())])
        raise DataError(f"{tally['path']}: no record is left to train on, of {read:,} ({why or 'the file holds none'}).")


def _them(count: int) -> str:
    return "it" if count == 1 else "them"


def _refuse(tally: Mapping[str, Any], verdict: str) -> NoReturn:
    shown = [str(BadRecord(**each)) for each in tally["bad_records"][:SHOWN_PROBLEMS]]
    count = tally["bad"]
    more = f" ({_reasons(tally)}); the first {len(shown)}" if count > len(shown) else ""
    noun = "bad record" if count == 1 else "bad records"
    raise DataError("\n".join([f"{tally['path']}: {count:,} {noun}{more}. {verdict}.", *(f"  {line}" for line in shown)]))


def _reasons(tally: Mapping[str, Any]) -> str:
    pairs = sorted(tally["bad_by_reason"].items(), key=lambda pair: -pair[1])
    return ", ".join(f"{count:,} {reason}" for reason, count in pairs)


def _prepare_pool(
    stores: Sequence[TokenStore],
    data: DataSection,
    stage: Stage,
    seq_len: int,
    cache_folder: Path,
    report: Report,
    head_start: float,
) -> Pool:
    overlong = overlong_of(data, stage)
    settings = {"seq_len": seq_len, "packing": data.packing, "overlong": overlong}
    key = fingerprint({"version": ROWS_VERSION, "tokens": [store.folder.name for store in stores]} | settings)
    folder = cache_folder / f"rows_{key}"

    def build(target: Path, lease: Lease) -> Mapping[str, Any]:
        shutil.rmtree(target)
        target.mkdir()
        return settings | write_rows(
            target,
            stores,
            seq_len=seq_len,
            packing=data.packing,
            overlong=overlong,
            together=documents_of(stage),
            progress=lease.progress,
        )

    meta = build_once(folder, build, what="rows", report=report, head_start=head_start)
    names = ", ".join(store.meta["path"] for store in stores)
    if not meta["rows"]:
        raise DataError(
            f"{names}: no row is left to train on: of {meta['documents']:,} samples {meta['overlong_documents']:,} are longer "
            f"than seq_len {seq_len:,} (overlong: {overlong}), and {meta['untrained_pieces']:,} pieces have no token to "
            "predict. Give records with longer texts or answers, or raise data.seq_len."
        )
    untrained, documents = meta["untrained_documents"], meta["documents"]
    if (
        documents_of(stage) == 2
        and data.overlong is None
        and meta["overlong_documents"] > data.max_untrained_fraction * documents
    ):
        raise DataError(
            f"{names}: {meta['overlong_documents']:,} of {documents:,} records are longer than a row of {seq_len:,}, both "
            f"answers together, and data.max_untrained_fraction allows {data.max_untrained_fraction:.1%} to be dropped for "
            "it. Raise data.seq_len or the limit, or write data.overlong=drop."
        )
    if untrained > data.max_untrained_fraction * documents:
        raise DataError(
            f"{names}: {untrained:,} of {documents:,} samples ({untrained / documents:.1%}) have no token left to train on in "
            f"rows of {seq_len:,} (overlong: {overlong}), and data.max_untrained_fraction allows "
            f"{data.max_untrained_fraction:.1%}. Raise data.seq_len, or the limit."
        )
    return Pool(stores, folder)


class Meter:
    """Tells how fast the work goes: to who waits for it, and to the user."""

    def __init__(self, report: Report, show: Show | None, lease: Lease, *, sizes: Mapping[str, int]) -> None:
        self._report, self._show, self._lease = report, show, lease
        self._sizes, self._total = sizes, sum(sizes.values())
        self._starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
        self._begun = self._said = time.monotonic()
        self._before = Tally()
        self._done_before = 0.0

    def take_up(self, tally: Tally) -> None:
        """Count from what an earlier builder had done."""
        self._before = Tally(read=tally.read, tokens=tally.tokens)
        self._report(f"taken up after {tally.read:,} records of an earlier start")

    def move(self, tally: Tally, path: str, done: float) -> None:
        """Take in how far the work is: `done` is the share of this file that has been read."""
        share = min(1.0, (self._starts[path] + done * self._sizes[path]) / max(1, self._total))
        now = time.monotonic()
        seconds = max(1e-3, now - self._begun)
        text = (
            f"{tally.read:,} records, {tally.tokens:,} tokens, {(tally.read - self._before.read) / seconds:,.0f} records/s, "
            f"{(tally.tokens - self._before.tokens) / seconds:,.0f} tokens/s"
        )
        self._done_before = self._done_before or share
        if share > self._done_before:
            text += f", {(1 - share) * seconds / (share - self._done_before):,.0f} s left"
        self._lease.progress(f"{share:.0%} done, {text}")
        if self._show:
            self._show(share, text)
        elif now - self._said >= _SAY_SECONDS:
            self._said = now
            self._report(f"tokenising: {share:.0%}, {text}")


def summary(rows: TokenRows) -> str:
    """What became of the data, in a line."""
    stores = [store.meta for pool in rows.pools for store in pool.stores]
    metas = [pool.meta for pool in rows.pools]

    def total(name: str) -> int:
        return sum(meta[name] for meta in metas)

    done = {"truncate": "truncated", "split": "split", "drop": "dropped"}[metas[0]["overlong"]]
    lost = f" ({total('lost_tokens'):,} tokens lost)" if total("lost_tokens") else ""
    bad = sum(store["bad"] for store in stores)
    skipped = f"; {bad:,} bad {'record' if bad == 1 else 'records'} left out" if bad else ""
    margins = sum(store["counts"].get(MARGIN_COUNT, 0) for store in stores)
    apart = f"; {margins:,} {MARGIN_COUNT}" if margins else ""
    return (
        f"{total('documents'):,} samples of {sum(store['tokens'] for store in stores):,} tokens: {rows.num_rows:,} rows of "
        f"{rows.seq_len:,}, {rows.num_tokens / (rows.num_rows * rows.seq_len):.1%} filled, "
        f"{rows.num_targets / rows.num_tokens:.1%} of the tokens are targets; "
        f"{total('overlong_documents'):,} overlong {done}{lost}, "
        f"{total('untrained_documents'):,} dropped without a target{skipped}{apart}"
    )
