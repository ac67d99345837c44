"""What the benchmarks share: interleaved timing, memory of a child process, tables, JSON results, other projects' packages.

Every benchmark first checks that what it compares gives equal results, then times it. Things to compare take turns
(A B A B ...), so that a busy machine slows all of them; the figure is the median of the CPU time, which other processes
disturb less than the wall time. Results go to docs/bench/NAME.json, and from there into docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("", "launch", "faults", "ranks")]  # scripts share code with tests
RESULTS = ROOT / "docs" / "bench"
SCRATCH = ROOT / "out" / "bench"
PEERS = SCRATCH / "peers"
"""A virtual environment for other projects' packages; it sees those of this one beside its own."""
PEER_PACKAGES = (
    "trl==1.16.0",
    "llamafactory==0.9.5",
    "axolotl==0.19.0",
    "numba==0.65.0",
    "llvmlite==0.47.0",
    "torchdata==0.11.0",
)
LAWS = {"Alpaca-like": (98.0, 0.75), "chat-like": (540.0, 0.8)}
"""Log-normal laws of length: median and sigma. Clipped to 1..2048 their means are about 130 and 700 tokens."""
CAPACITY = 2048

MIB = 1 << 20


def parse_arguments(description: str | None) -> argparse.Namespace:
    """`--quick`, and the options that the scripts give their own child processes."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Scratch files go to out/bench, the results to docs/bench. Then: python scripts/bench/write_docs.py",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute; prints, writes no results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def lengths_of(law: str, count: int, seed: int = 0) -> Any:
    """(count,) int64: token lengths drawn from a law."""
    import numpy as np

    median, sigma = LAWS[law]
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return np.clip(drawn, 1, CAPACITY).astype(np.int64)


# -- rows ---------------------------------------------------------------------------------------------------------------


def write_store(folder: Path, lengths: Any, *, tokens: bool = False) -> None:
    """A store of documents whose second half is trained.

    Without tokens their file is a hole, which planning does not read.
    """
    import numpy as np

    from ds_trainer.data.store import write_index

    folder.mkdir(parents=True)
    count, total = len(lengths), int(lengths.sum())
    with open(folder / "tokens.bin", "wb") as file:
        if tokens:
            random = np.random.default_rng(1)
            for start in range(0, total, 1 << 24):
                file.write(random.integers(0, 50_000, min(1 << 24, total - start), dtype=np.uint16).data)
        else:
            file.truncate(2 * total)
    write_index(folder / "tokens.idx", lengths.astype(np.int32), "uint16")
    np.stack([lengths // 2, lengths], axis=1).astype("<i4").tofile(folder / "spans.bin")
    np.arange(count + 1).astype("<i8").tofile(folder / "span_offsets.bin")
    np.arange(1, count + 1).astype("<i8").tofile(folder / "lines.bin")
    (folder / "meta.json").write_text('{"max_token_id": 49999, "path": ""}')


def make_rows(name: str, lengths: Any, seq_len: int) -> Path:
    """A store in out/bench and rows packed from it; kept for the next run."""
    from ds_trainer.data.prepare import ROWS_VERSION
    from ds_trainer.data.rows import write_rows
    from ds_trainer.data.store import TokenStore

    folder = SCRATCH / f"{name}_{ROWS_VERSION}"
    if not (folder / "rows" / "meta.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_store(folder / "store", lengths, tokens=True)
        (folder / "rows").mkdir()
        store = TokenStore(folder / "store")
        counts = write_rows(folder / "rows", [store], seq_len=seq_len, packing=True, overlong="truncate")
        (folder / "rows" / "meta.json").write_text(json.dumps(counts | {"seq_len": seq_len}))
    return folder


def open_rows(folder: Path) -> Any:
    """The `TokenRows` that `make_rows` made."""
    from ds_trainer.data.rows import Pool, TokenRows
    from ds_trainer.data.store import TokenStore

    pool = Pool([TokenStore(folder / "store")], folder / "rows")
    return TokenRows(
        pools=(pool,),
        weights=(),
        seq_len=pool.meta["seq_len"],
        num_tokens=pool.meta["tokens"],
        num_targets=pool.meta["targets"],
        max_token_id=pool.stores[0].meta["max_token_id"],
        fingerprint="",
    )


# -- time ---------------------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """CPU time of this process and of the children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 5,
    before: Callable[[], Any] = lambda: None,
    each_at_least: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """Run the contenders in turns; seconds of one call of each: median and least, CPU and wall.

    Args:
        contenders: name -> what is timed.
        repeats: rounds.
        before: called before each timed call, untimed.
        each_at_least: a turn calls a contender as often as this many wall seconds hold.
    """
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            before()
            gc.collect()
            calls, wall_begun, cpu_begun = 0, time.perf_counter(), cpu_seconds()
            while calls == 0 or time.perf_counter() - wall_begun < each_at_least:
                run()
                calls += 1
            cpu[name].append((cpu_seconds() - cpu_begun) / calls)
            wall[name].append((time.perf_counter() - wall_begun) / calls)
    return {name: times(cpu[name], wall[name]) for name in contenders}


def times(cpu: Sequence[float], wall: Sequence[float]) -> dict[str, Any]:
    return {
        "cpu_s": statistics.median(cpu),
        "cpu_s_min": min(cpu),
        "wall_s": statistics.median(wall),
        "wall_s_min": min(wall),
        "repeats": len(cpu),
    }


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent of growth: least squares of log(seconds) over log(size)."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


# -- memory -------------------------------------------------------------------------------------------------------------


def resident(kind: str = "VmRSS") -> int:
    """Resident bytes of this process now (`VmRSS`, `RssAnon`, `RssFile`), or the most there were (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(kind)


def peak_above(run: Callable[[], Any]) -> int:
    """Bytes that this process holds at most while it runs, above what it holds before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = resident()
    result = run()
    peak = resident("VmHWM")
    del result
    return peak - before


def in_child(script: str, *arguments: object, python: Path | None = None) -> Any:
    """Run a benchmark's `--child` part in a process of its own; what it prints last is JSON."""
    command = [str(python or sys.executable), str(script), "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# -- other projects' packages -------------------------------------------------------------------------------------------


def peers_python() -> Path | None:
    """The interpreter of the environment for other projects' packages, made on the first call; None if that fails.

    The packages come without what they depend on: only their packers are called. What those import beside is either
    installed here (numba) or found in the environment of this project (torch, datasets).
    """
    python, marker = PEERS / "bin" / "python", PEERS / "ready.txt"
    wanted = "\n".join(PEER_PACKAGES)
    if marker.exists() and marker.read_text() == wanted:
        return python
    print(f"installing {', '.join(PEER_PACKAGES)} into {PEERS.relative_to(ROOT)}")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        own = subprocess.check_output(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
        )
        shared = importlib.metadata.distribution("numpy").locate_file("")
        Path(own.strip(), "beside.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n")
        pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", *PEER_PACKAGES]
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=600)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"other projects are left out: {error} {getattr(error, 'stderr', '') or ''}")
        return None
    marker.write_text(wanted)
    return python


# -- results ------------------------------------------------------------------------------------------------------------


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("numpy", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def goal(name: str, limit: float, found: float, unit: str = "", *, at_least: bool = False) -> dict[str, Any]:
    """A figure beside its goal."""
    return {
        "name": name,
        "goal": ("at least " if at_least else "at most ") + f"{limit:,g}{' ' + unit if unit else ''}",
        "found": found,
        "unit": unit,
        "met": bool(found >= limit if at_least else found <= limit),
    }


def finish(
    name: str,
    *,
    quick: bool,
    goals: Sequence[Mapping[str, Any]],
    tables: Sequence[Mapping[str, Any]],
    packages: Mapping[str, str],
    notes: Sequence[str] = (),
    seed: int | None = None,
) -> None:
    """Print the tables, and write docs/bench/NAME.json if this is a whole run.

    Args:
        name: of the benchmark.
        quick: a run with small sizes, which is not kept.
        goals: made by `goal`.
        tables: each with `title`, `columns` and `rows`; cells are texts or numbers.
        packages: of `versions`.
        notes: sentences printed with the tables.
        seed: of what is random, where something is.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=150)
    judged = {
        "title": "Goals",
        "columns": ["figure", "goal", "found", "met"],
        "rows": [[each["name"], each["goal"], shown_with(each), "yes" if each["met"] else "NO"] for each in goals],
    }
    for each in (*tables, judged):
        console.print("\n" + escape(each["title"]))
        table = Table(*map(escape, each["columns"]))
        for row in each["rows"]:
            table.add_row(*(escape(shown(cell)) for cell in row))
        console.print(table)
    for note in notes:
        console.print(note)
    load = os.getloadavg()[0]
    console.print(f"load average {load:.1f}; " + ", ".join(f"{key} {value}" for key, value in packages.items()))
    if quick:
        console.print("a quick run: the results are not kept")
        return
    result = {
        "name": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"cores": len(os.sched_getaffinity(0)), "load_average": round(load, 2)},
        "versions": dict(packages),
        "seed": seed,
        "command": " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
        "goals": list(goals),
        "tables": list(tables),
        "notes": list(notes),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: docs/bench/{name}.json")


def shown(value: Any) -> str:
    """A cell as text: four digits that count."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != value:
            return "-"
        if 0.99 < value < 1:  # shares: the distance from 1 counts
            return f"{value:.4f}"
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def shown_with(each: Mapping[str, Any]) -> str:
    return shown(each["found"]) + (f" {each['unit']}" if each["unit"] else "")
