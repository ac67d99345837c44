"""The story of preparing: the data of a run made ready ahead of it, and an account of what became of every record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from ds_trainer.arguments.engine_config import solve_run_batch
from ds_trainer.arguments.merge import Resolved
from ds_trainer.data.chunks import BadRecord
from ds_trainer.data.prepare import judge
from ds_trainer.data.rows import TokenRows
from ds_trainer.data.store import TokenStore
from ds_trainer.errors import DataError
from ds_trainer.model.load import load_config
from ds_trainer.run_data import RunData, length_of, place_of, plan_steps, prepare_run_data

REPORT = "data_report.json"
_EXAMPLES = 2
_BAR = 40


def prepare(resolved: Resolved, console: Console, *, world_size: int, show: int, workers: int | None) -> None:
    """Tokenise and pack the data of a run, show what became of it, and write the same to the run folder.

    Args:
        resolved: the settings in force.
        console: the terminal.
        world_size: ranks to count the steps for.
        show: samples to print, decoded.
        workers: processes that tokenise; by default one for each core.

    Raises:
        DsTrainerError: with a text for the user, after the report where there is one.
    """
    batch = solve_run_batch(resolved, world_size)
    columns = (TextColumn("tokenising"), BarColumn(bar_width=30), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        data = prepare_run_data(
            resolved,
            batch,
            load_config(resolved.settings.model),
            lambda line: bar.console.print(line, markup=False),
            workers=workers,
            show=(lambda share, text: bar.update(task, completed=share, description=text)) if console.is_terminal else None,
            all_problems=True,
        )
    folder = Path(resolved.settings.checkpoint.folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = describe(data)
    (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    for line in as_text(report):
        console.print(line, markup=False)
    console.print(f"\nAll of this, and every record that was left out: {folder / REPORT}", markup=False)
    if data.stream:
        console.print(
            "The training data is streamed: it was not read here, and its bad records are found while it is trained on. "
            "To go through it now: the same command with data.streaming=false.",
            markup=False,
        )
    for rows in (data.rows, *data.held_out.values()):
        for store in stores_of(rows):
            try:
                judge(store.meta, resolved.settings.data, so_far=False)
            except DataError as error:
                raise DataError(str(error).splitlines()[0]) from None  # the records are listed above
    if data.rows:
        plan = plan_steps(resolved, data.rows, batch)
        console.print(f"Run: {length_of(plan, data)}; {batch}", markup=False)
    shown = [store for rows in (data.rows, *data.held_out.values()) for store in stores_of(rows)]
    for text in samples(data.tokenizer, shown, show, console.is_terminal):
        console.print(text)


def stores_of(rows: TokenRows | None) -> list[TokenStore]:
    """The token stores behind rows."""
    return [store for pool in rows.pools for store in pool.stores] if rows else []


def describe(data: RunData) -> dict[str, Any]:
    """What became of every source, as JSON."""
    report: dict[str, Any] = {}
    sets = {f"held_out {name}".rstrip(): rows for name, rows in data.held_out.items()}
    for name, rows in {"data": data.rows, **sets}.items():
        if rows is None:
            continue
        report[name] = {
            "sources": [{**store.meta, "folder": str(store.folder)} for store in stores_of(rows)],
            "rows": [pool.meta for pool in rows.pools],
            "num_rows": rows.num_rows,
            "fill": rows.num_tokens / (rows.num_rows * rows.seq_len),
            "seq_len": rows.seq_len,
        }
    return report


def as_text(report: dict[str, Any]) -> Iterator[str]:
    """The report as people read it."""
    for name, part in report.items():
        title = name.replace("held_out", "held-out data")
        for source in part["sources"]:
            yield from _source_lines(title, source)
        for number, rows in enumerate(part["rows"]):
            yield _rows_line(title, part, number, rows)


def _rows_line(title: str, part: dict[str, Any], number: int, rows: dict[str, Any]) -> str:
    sources = part["sources"]
    of = f" of {sources[number]['path']}" if len(part["rows"]) > 1 else " of all sources" if len(sources) > 1 else ""
    fill = rows["tokens"] / (rows["rows"] * part["seq_len"])
    return (
        f"\n{title}, rows{of}: {rows['rows']:,} of {part['seq_len']:,}, {'packed' if rows['packing'] else 'padded'}, "
        f"{fill:.1%} filled; {rows['overlong_documents']:,} samples overlong "
        f"({rows['overlong']}), {rows['lost_tokens']:,} tokens lost, "
        f"{rows['untrained_documents']:,} samples left without a token to train on"
    )


def _source_lines(name: str, source: dict[str, Any]) -> Iterator[str]:
    count = len(source["files_read"])
    files = "1 file" if count == 1 else f"{count:,} files"
    yield f"\n{name}: {source['path']} (format {source['format']}, {files})"
    read, kept = source["read"], source["documents"] // source.get("together", 1)
    yield f"  records    {read:,} read, {kept:,} kept, {read - kept:,} left out"
    by_reason = sorted(source["bad_by_reason"].items(), key=lambda pair: -pair[1])
    for reason, count in by_reason:
        yield f"    {count:>8,}  {reason}"
        examples = [BadRecord(**each) for each in source["bad_records"] if each["reason"] == reason]
        for example in examples[:_EXAMPLES]:
            yield f"              {example}"
    for what, count in sorted(source["counts"].items()):
        yield f"    {count:>8,}  {what}"
    tokens = max(1, source["tokens"])
    yield f"  tokens     {source['tokens']:,}, {source['trained_tokens'] / tokens:.1%} of them trained"
    yield from _histogram(source["lengths"])


def _histogram(lengths: list[int]) -> Iterator[str]:
    filled = [power for power, count in enumerate(lengths) if count]
    if not filled:
        return
    most = max(lengths)
    for power in range(filled[0], filled[-1] + 1):
        span = f"{2**power:,} to {2 ** (power + 1) - 1:,}"
        bar = "#" * -(-lengths[power] * _BAR // most)
        heading = "lengths" if power == filled[0] else ""
        yield f"  {heading:<9}  {span:>24}  {lengths[power]:>12,}  {bar}"


def samples(tokenizer: Any, stores: list[TokenStore], count: int, colours: bool) -> Iterator[Text]:
    """The first samples of each source, decoded, with the trained tokens marked."""
    marks = "green: trained, dim: not" if colours else "[[trained]], the rest is not"
    for store in stores if count else []:
        yield Text(f"\nthe first samples of {store.meta['path']} ({marks})", style="bold")
        for document in range(min(count, store.num_documents)):
            ids, trained = store.sample(document)
            place = place_of(store, document)
            text = Text(f"{place}: {len(ids)} tokens, {sum(trained)} trained\n", style="bold")
            yield text.append(marked(tokenizer, ids, trained, colours))


def marked(tokenizer: Any, ids: list[int], trained: list[bool], colours: bool) -> Text:
    """Token ids as text; trained ones are green, or in double brackets where there is no colour."""
    text = Text()
    begin = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and trained[end] == trained[begin]:
            continue
        piece = tokenizer.decode(ids[begin:end])
        if colours:
            text.append(piece, style="green" if trained[begin] else "dim")
        else:
            text.append(f"[[{piece}]]" if trained[begin] else piece)
        begin = end
    return text
