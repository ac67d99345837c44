"""How fast packed rows are read in random order, and what memory a long random read holds.

1e5 rows of 2048 tokens, packed from chat-like documents: by `TokenRows.read`, one row at a time and 8 at a time, and by
`datasets[i]` on an Arrow file of the same rows with the columns input_ids, labels and position_ids (int32). Both have the
files in the page cache. `TokenRows.read` works out labels, positions and what is padding, and gives tensors; `datasets[i]`
gives stored lists, which a collator then makes tensors of, or numpy arrays. Checked before: both give equal rows.

Memory: a rank reads random rows of a cache of 10 million rows of 32 tokens through `loader.windows`;
with files that were just written, which lie in the page cache in large pieces, and with files that come back from the disk.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    MIB,
    SCRATCH,
    cpu_seconds,
    finish,
    goal,
    in_child,
    lengths_of,
    make_rows,
    open_rows,
    parse_arguments,
    peak_above,
    resident,
    take_turns,
    versions,
)

COLUMNS = ("input_ids", "labels", "position_ids")


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.child:
        folder, reads = arguments.child
        print(json.dumps(memory_of_reading(Path(folder), int(reads))))
        return
    wanted = 10**4 if arguments.quick else 10**5
    # Chat-like documents fill 0.999 of the rows with 703 tokens each.
    lengths = lengths_of("chat-like", int(wanted * 2048 / 690))
    folder = make_rows(f"random_read_{wanted}", lengths, 2048)
    rows = open_rows(folder)
    assert rows.num_rows >= wanted
    in_order = dataset_of(folder, rows, wanted)
    in_numpy = in_order.with_format("numpy")
    check(rows, in_order, in_numpy, wanted)

    count = 200 if arguments.quick else 1000
    which = itertools.cycle(np.random.default_rng(0).permutation(wanted).tolist())

    def eight() -> None:
        for _ in range(count // 8):
            rows.read(list(itertools.islice(which, 8)))

    def one_by_one(read: Callable[[int], Any]) -> Callable[[], None]:
        def run() -> None:
            for row in itertools.islice(which, count // 8 * 8):
                read(row)

        return run

    contenders = {
        "TokenRows.read, one row": one_by_one(lambda row: rows.read([row])),
        "TokenRows.read, 8 rows": eight,
        "datasets[i]": one_by_one(lambda row: in_order[row]),
        "datasets[i], then torch.tensor": one_by_one(lambda row: [torch.tensor(each) for each in in_order[row].values()]),
        "datasets[i], numpy format": one_by_one(lambda row: in_numpy[row]),
    }
    took = take_turns(contenders, repeats=5, each_at_least=0.5)
    speed = {name: count // 8 * 8 / each["cpu_s"] for name, each in took.items()}
    table = {
        "title": f"Random rows of 2048 tokens out of {wanted:,}",
        "columns": ["how", "rows/s, CPU", "rows/s, wall", "us a row", "datasets[i] = 1"],
        "rows": [
            [name, each, count // 8 * 8 / took[name]["wall_s"], 1e6 / each, each / speed["datasets[i]"]]
            for name, each in speed.items()
        ],
    }
    ours = speed["TokenRows.read, one row"]
    goals = [
        goal("one row at a time, against datasets[i]", 5, ours / speed["datasets[i]"], "times", at_least=True),
        goal("8 rows, against datasets[i]", 5, speed["TokenRows.read, 8 rows"] / speed["datasets[i]"], "times", at_least=True),
    ]

    many = 10**6 if arguments.quick else 10**7
    name, runs, most = f"many_rows_{many}", [], 0
    shutil.rmtree(SCRATCH / name, ignore_errors=True)  # written anew: how much one touch maps depends on how pages came in
    large = make_rows(name, short_lengths(many), 32)
    size = sum(file.stat().st_size for file in large.rglob("*") if file.is_file())
    for state in ("just written", "read back from the disk"):
        if state != "just written":
            leave_cache(large)
        used = in_child(__file__, large, 20_000 if arguments.quick else 200_000)
        for run in used["runs"]:
            most = max(most, run["peak"])
            each = [run["peak"] / MIB, run["own"] / MIB, run["seconds"] * 1e6]
            runs.append([state, run["micro_batch_size"], *each])
    goals.append(goal(f"resident above the start, cache of {used['rows']:,} rows", 100, most / MIB, "MiB"))
    memory = {
        "title": f"Memory of a rank that reads {used['read']:,} of {used['rows']:,} rows ({size / MIB:,.0f} MiB of files)",
        "columns": ["files", "micro-batch", "resident at most, MiB", "of it still there, not of files, MiB", "us a row"],
        "rows": runs,
    }
    packages = versions("torch", "datasets", "pyarrow")
    finish("random_read", quick=arguments.quick, goals=goals, tables=[table, memory], packages=packages)


def leave_cache(folder: Path) -> None:
    """Ask the system to drop the files from its cache, so that they come in anew, page by page."""
    for path in folder.rglob("*.*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def short_lengths(rows: int) -> Any:
    """Documents of 8 to 32 tokens that fill at least so many rows of 32."""
    return np.random.default_rng(2).integers(8, 33, int(rows * 1.55))


def dataset_of(folder: Path, rows: Any, count: int) -> Any:
    """The same rows as an Arrow file, opened by `datasets`."""
    import datasets
    import pyarrow

    path = folder / "rows.arrow"
    if not path.exists():
        schema = pyarrow.schema({name: pyarrow.list_(pyarrow.int32()) for name in COLUMNS})
        part = path.with_suffix(".part")
        with pyarrow.ipc.new_stream(part, schema) as writer:
            for start in range(0, count, 1000):  # the batches that datasets writes by default
                batch = rows.read(range(start, min(start + 1000, count)))
                offsets = np.arange(0, batch.input_ids.numel() + 1, rows.seq_len, dtype=np.int32)
                arrays = [
                    pyarrow.ListArray.from_arrays(offsets, getattr(batch, name).numpy().astype(np.int32).reshape(-1))
                    for name in COLUMNS
                ]
                writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
        shutil.move(part, path)
    return datasets.Dataset.from_file(str(path))


def check(rows: Any, in_order: Any, in_numpy: Any, count: int) -> None:
    for row in np.random.default_rng(3).integers(0, count, 50).tolist():
        batch = rows.read([row])
        for name in COLUMNS:
            expected = getattr(batch, name)[0].tolist()
            assert in_order[row][name] == expected
            assert in_numpy[row][name].tolist() == expected


def memory_of_reading(folder: Path, reads: int) -> dict[str, Any]:
    from ds_trainer.data.loader import windows
    from ds_trainer.data.order import Order

    torch.zeros(1)
    runs = []
    for micro_batch_size in (8, 1):
        rows = open_rows(folder)
        loader: Iterator[Any] = windows(
            rows,
            Order(num_rows=(rows.num_rows,), seed=0, total_rows=None),
            first_position=0,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=8,
            rank=0,
            data_parallel_size=1,
            convert=lambda batch: batch,
        )
        own = resident("RssAnon")

        def read(loader: Iterator[Any] = loader, size: int = micro_batch_size) -> None:
            for _ in range(reads // 2 // (8 * size)):
                next(loader)

        begun = cpu_seconds()
        peak = peak_above(read)
        took = (cpu_seconds() - begun) / (reads // 2)
        runs.append({"micro_batch_size": micro_batch_size, "peak": peak, "own": resident("RssAnon") - own, "seconds": took})
    return {"rows": rows.num_rows, "read": reads, "runs": runs}


if __name__ == "__main__":
    SCRATCH.mkdir(parents=True, exist_ok=True)
    main()
