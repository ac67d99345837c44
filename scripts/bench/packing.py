"""How fast documents are packed into rows, how full the rows are, and what memory it takes.

Two laws of length, clipped to 2048 and packed into rows of 2048:
  Alpaca-like  log-normal, median 98, sigma 0.75, mean about 130 tokens
  chat-like    log-normal, median 540, sigma 0.8, mean about 700 tokens
Beside ours, the packers of TRL, LLaMA-Factory and axolotl, called from their own packages (out/bench/peers), at 1e5
documents: whole, and in the groups they make by default. TRL's also copies the tokens; the others only decide, as does
`best_fit_decreasing`, which they are compared with. A whole `pack` also brings the segments into the order of the rows. The
product packs 2^20 documents at a time (`write_rows`), so 1e7 in one `pack` is what it never does.
Checked before anything is timed: every document lies in one row, and no row is over its capacity.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    CAPACITY,
    LAWS,
    SCRATCH,
    cpu_seconds,
    finish,
    goal,
    in_child,
    lengths_of,
    parse_arguments,
    peak_above,
    peers_python,
    slope,
    take_turns,
    versions,
    write_store,
)

from ds_trainer.data.pack import Segments, best_fit_decreasing, pack


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.child:
        child(*arguments.child)
        return
    sizes = [10**4, 10**5, 10**6] if arguments.quick else [10**4, 10**5, 10**6, 10**7]
    SCRATCH.mkdir(parents=True, exist_ok=True)
    goals, rows, memory = [], [], []
    for law in LAWS:
        deciding, whole = [], []
        for size in sizes:
            lengths = lengths_of(law, size)
            segments = whole_documents(lengths)
            num_rows = check(lengths, best_fit_decreasing(lengths, CAPACITY))
            packed = pack(segments, CAPACITY)
            assert packed.num_rows == num_rows
            assert np.array_equal(np.sort(packed.segments.document), segments.document)
            assert np.add.reduceat(packed.segments.length, packed.offsets[:-1]).max() <= CAPACITY
            del packed
            took = take_turns(
                {
                    "decide": lambda lengths=lengths: best_fit_decreasing(lengths, CAPACITY),
                    "pack": lambda segments=segments: pack(segments, CAPACITY),
                },
                repeats=3 if size > 10**6 else 5,
                each_at_least=0.2,
            )
            fill = float(lengths.sum() / (num_rows * CAPACITY))
            deciding.append(took["decide"]["cpu_s"])
            whole.append(took["pack"]["cpu_s"])
            speeds = [size / seconds / 1e6 for seconds in (deciding[-1], whole[-1], took["pack"]["wall_s"])]
            rows.append([law, size, *speeds, fill])
            if size >= 10**6:
                for what, speed in zip(("deciding", "whole pack"), speeds, strict=False):
                    goals.append(goal(f"{law}, {size:,} documents: {what}", 5, speed, "M samples/s", at_least=True))
        goals.append(goal(f"{law}: fill", 0.998 if law == "Alpaca-like" else 0.985, fill, at_least=True))
        for what, seconds in (("deciding", deciding), ("whole pack", whole)):
            goals.append(goal(f"{law}: cost of {what} grows as n to the power", 1.1, slope(sizes, seconds)))
            last = slope(sizes[-2:], seconds[-2:])
            goals.append(goal(f"{law}: {what}, from {sizes[-2]:,} to {sizes[-1]:,} alone", 1.1, last))
        for what in ("best_fit_decreasing", "pack", "write_rows"):
            used = in_child(__file__, "memory", law, sizes[-1], what)
            memory.append([law, what, sizes[-1], used["peak"] / 1e6, used["peak"] / sizes[-1]])
            if what == "pack":
                goals.append(goal(f"{law}: memory of pack beside its input", 60, memory[-1][-1], "bytes/sample"))
            if what == "write_rows":
                goals.append(goal(f"{law}: memory of planning the rows of a store", 60, memory[-1][-1], "bytes/sample"))
                rate = sizes[-1] / used["cpu_s"] / 1e6
                memory[-1].append(rate)
            else:
                memory[-1].append(None)
    tables = [
        {
            "title": "Ours, one core",
            "columns": ["law", "documents", "deciding, M/s", "whole pack, M/s", "whole pack, M/s, wall", "fill"],
            "rows": rows,
        },
        {
            "title": "Memory at most, above the start (write_rows also cuts, counts targets and writes)",
            "columns": ["law", "what", "documents", "MB", "bytes a sample", "M/s"],
            "rows": memory,
        },
    ]
    packages = versions()
    python = peers_python()
    if python:
        count = 10**4 if arguments.quick else 10**5
        beside, found = [], {}
        for law in LAWS:
            answer = in_child(__file__, "peers", law, count, 1 if arguments.quick else 3, python=python)
            packages |= answer["versions"]
            found[law] = answer["figures"]
            ours = answer["figures"]["ds_trainer, whole"]
            for name, each in answer["figures"].items():
                if "error" in each:
                    print(f"{name} is left out: {each['error']}")
                    continue
                speed = count / each["cpu_s"] / 1e6
                beside.append([law, name, speed, each["cpu_s"] / ours["cpu_s"], each["fill"]])
        tables.append(
            {
                "title": f"Beside others, {count:,} documents, in turns in one process",
                "columns": ["law", "packer", "M samples/s", "time, ours = 1", "fill"],
                "rows": beside,
            }
        )
    finish("packing", quick=arguments.quick, goals=goals, tables=tables, packages=packages)


def whole_documents(lengths: Any) -> Segments:
    return Segments(np.arange(len(lengths)), np.zeros(len(lengths), np.int64), lengths)


def check(lengths: Any, row_of: Any) -> int:
    """Every document has one row and no row is over its capacity; gives the number of rows."""
    assert row_of.shape == lengths.shape
    loads = np.bincount(row_of, weights=lengths)
    assert loads.min() > 0
    assert loads.max() <= CAPACITY
    return len(loads)


def child(what: str, law: str, count: str, *rest: str) -> None:
    lengths = lengths_of(law, int(count))
    print(json.dumps(memory_of(lengths, rest[0]) if what == "memory" else beside_others(lengths, int(rest[0]))))


def memory_of(lengths: Any, what: str) -> dict[str, float]:
    best_fit_decreasing(lengths[:1000], CAPACITY)
    if what == "best_fit_decreasing":
        return {"peak": peak_above(lambda: best_fit_decreasing(lengths, CAPACITY))}
    if what == "pack":
        segments = whole_documents(lengths)
        return {"peak": peak_above(lambda: pack(segments, CAPACITY))}
    from ds_trainer.data.rows import write_rows
    from ds_trainer.data.store import TokenStore

    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        store, rows = Path(folder, "store"), Path(folder, "rows")
        rows.mkdir()
        write_store(store, lengths)
        opened = TokenStore(store)
        begun = cpu_seconds()
        peak = peak_above(lambda: write_rows(rows, [opened], seq_len=CAPACITY, packing=True, overlong="truncate"))
        return {"peak": peak, "cpu_s": cpu_seconds() - begun}


# -- in the environment of the other projects ---------------------------------------------------------------------------


def beside_others(lengths: Any, repeats: int) -> dict[str, Any]:
    packers: dict[str, Callable[[], Any]] = {}
    rows_of: dict[str, Callable[[Any], int]] = {}
    errors: dict[str, Any] = {}

    packers["ds_trainer, whole"] = lambda: best_fit_decreasing(lengths, CAPACITY)
    rows_of["ds_trainer, whole"] = lambda row_of: check(lengths, row_of)
    for add in (add_trl, add_llamafactory, add_axolotl):
        try:
            add(lengths, packers, rows_of)
        except Exception as error:
            errors[add.__name__.removeprefix("add_")] = {"error": f"{type(error).__name__}: {error}"}
    num_rows = {name: rows_of[name](run()) for name, run in packers.items()}
    took = take_turns(packers, repeats=repeats)
    total = int(lengths.sum())
    figures = {name: took[name] | {"fill": total / (num_rows[name] * CAPACITY)} for name in packers}
    return {"figures": figures | errors, "versions": versions("trl", "llamafactory", "axolotl", "numba")}


def add_trl(lengths: Any, packers: dict[str, Any], rows_of: dict[str, Any]) -> None:
    import datasets
    import pyarrow
    from trl.data_utils import _pack_bfd, pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # Each token names its document, so that the result can be checked.
    tokens = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    column = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(tokens))
    table = pyarrow.table({"input_ids": column})
    dataset = datasets.Dataset(table)

    def count_rows(packed: Any) -> int:
        packed = packed if isinstance(packed, pyarrow.Table) else packed.data.table
        loads = pyarrow.compute.list_value_length(packed["input_ids"]).to_numpy()
        assert loads.max() <= CAPACITY
        found = np.concatenate([chunk.flatten().to_numpy() for chunk in packed["input_ids"].chunks])
        assert np.array_equal(np.bincount(found, minlength=len(lengths)), lengths)
        return len(loads)

    packers["TRL _pack_bfd, whole"] = lambda: _pack_bfd(table, CAPACITY)
    packers["TRL pack_dataset, by 1000"] = lambda: pack_dataset(dataset, CAPACITY, "bfd")
    rows_of["TRL _pack_bfd, whole"] = rows_of["TRL pack_dataset, by 1000"] = count_rows


def add_llamafactory(lengths: Any, packers: dict[str, Any], rows_of: dict[str, Any]) -> None:
    knapsack = load(source_of("llamafactory", "data/processor/processor_utils.py")).greedy_knapsack
    numbers = lengths.tolist()

    def by_1000() -> list[list[int]]:
        starts = range(0, len(numbers), 1000)
        return [row for start in starts for row in knapsack(numbers[start : start + 1000], CAPACITY)]

    def count_rows(packed: list[list[int]]) -> int:
        assert max(map(sum, packed)) <= CAPACITY
        assert sorted(length for row in packed for length in row) == sorted(numbers)
        return len(packed)

    packers["LLaMA-Factory greedy_knapsack, whole"] = lambda: knapsack(numbers.copy(), CAPACITY)
    packers["LLaMA-Factory greedy_knapsack, by 1000"] = by_1000
    rows_of["LLaMA-Factory greedy_knapsack, whole"] = rows_of["LLaMA-Factory greedy_knapsack, by 1000"] = count_rows


def add_axolotl(lengths: Any, packers: dict[str, Any], rows_of: dict[str, Any]) -> None:
    path = source_of("axolotl", "utils/samplers/multipack.py")
    # The module logs and, elsewhere in the file, talks to other ranks; the packer needs neither.
    stand_in: Any = types.ModuleType("stand_in")
    stand_in.get_logger = __import__("logging").getLogger
    stand_in.reduce_and_broadcast = None
    for name in ("axolotl", "axolotl.utils", "axolotl.utils.distributed", "axolotl.utils.logging"):
        sys.modules[name] = stand_in
    pack_parallel = load(path).pack_parallel
    short = lengths.astype(np.int32)

    def run() -> list[list[int]]:
        # group_size and bin_size: axolotl's defaults.
        packed: list[list[int]] = pack_parallel(short, CAPACITY, group_size=100_000, bin_size=200, num_processes=1)
        return packed

    def count_rows(packed: list[list[int]]) -> int:
        row_of = np.full(len(lengths), -1)
        for row, documents in enumerate(packed):
            row_of[np.array(documents)] = row
        assert row_of.min() == 0
        return check(lengths, row_of)

    packers["axolotl pack_parallel, by 100,000"] = run
    rows_of["axolotl pack_parallel, by 100,000"] = count_rows


def source_of(package: str, path: str) -> Path:
    """A module of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0], path)


def load(path: Path) -> Any:
    """One module, without the package around it."""
    spec = importlib.util.spec_from_file_location(f"packer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    begun = time.monotonic()
    main()
    if "--child" not in sys.argv:
        print(f"{time.monotonic() - begun:.0f} s")
