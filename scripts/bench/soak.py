"""Watch one long run: 1,000 steps on two ranks, a save every 5 steps; memory, open files, threads and disk must stay flat.

Both ranks are sampled from /proc once a second, from the first fifth of the steps on; slopes are least squares. The disk is
that of the checkpoints, which may hold `keep_last` of them and one that is being written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import finish, goal, versions
from helpers import write_corpus, write_run
from live import LiveRun, launched

EVERY, KEEP = 5, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="default 1000")
    parser.add_argument("--quick", action="store_true", help="100 steps; prints, writes no results")
    arguments = parser.parse_args()
    steps = 100 if arguments.quick else arguments.steps
    with tempfile.TemporaryDirectory() as scratch:
        samples, checkpoint_bytes, saves, seconds = watch(Path(scratch), steps)
    late = [each for each in samples if each["step"] >= steps / 5]
    rows, goals = [], []
    for rank in (0, 1):
        for name, unit in (("resident", "MiB"), ("files", ""), ("threads", "")):
            values = [each[f"{name}_{rank}"] for each in late]
            slope = statistics.linear_regression([each["step"] for each in late], values).slope * 1000
            first, last = ends(values)
            rows.append([f"rank {rank}: {name}{', ' + unit if unit else ''}", first, max(values), last, slope])
            if name == "resident":
                goals.append(goal(f"rank {rank}: memory", 1.0, slope, "MiB more in 1,000 steps"))
            else:
                goals.append(goal(f"rank {rank}: {name}, more at the end", 0, last - first))
    disk = [each["disk"] for each in late]
    rows.append(["checkpoints on the disk, MiB", ends(disk)[0], max(disk), ends(disk)[1], None])
    most = max(disk) * 2**20 / checkpoint_bytes
    goals.append(goal("checkpoints on the disk", KEEP + 1.05, most, "times one"))  # and the bytes of `latest`
    finish(
        "soak",
        quick=arguments.quick,
        goals=goals,
        tables=[
            {
                "title": f"{steps} steps on two ranks in {seconds:.0f} s, {saves} checkpoints, {len(late)} samples",
                "columns": ["what", f"after step {late[0]['step']}", "most", "at the end", "more in 1,000 steps"],
                "rows": rows,
            }
        ],
        packages=versions("torch", "deepspeed"),
    )


def ends(values: list[float]) -> tuple[float, float]:
    """The medians of the first and the last fifth: while a checkpoint is being written there is a file and a thread more."""
    count = max(1, len(values) // 5)
    return statistics.median(values[:count]), statistics.median(values[-count:])


def watch(folder: Path, steps: int) -> tuple[list[dict[str, Any]], int, int, float]:
    """Samples of the run, the bytes of the last checkpoint, how many there were, and the seconds it took."""
    corpus = folder / "corpus"
    corpus.mkdir()
    write_corpus(corpus)
    checkpoint = {"every_steps": EVERY, "keep_last": KEEP}
    config = write_run(corpus, folder, train={"max_steps": steps}, checkpoint=checkpoint)
    run = folder / "run"
    samples: list[dict[str, Any]] = []
    begun = time.monotonic()
    with LiveRun(launched("torchrun", "train", "--config", str(config)), cwd=folder, folder=run) as live:
        live.wait_until(lambda: step_of(run) > 0 or live.process.poll() is not None, "the first step")
        ranks = live.ranks()
        while live.process.poll() is None:
            try:
                own = {f"{name}_{rank}": value for rank in (0, 1) for name, value in sample(ranks[rank]).items()}
            except OSError:
                break  # it has ended
            samples.append({"step": step_of(run), **own, "disk": size(run / "checkpoints") / 2**20})
            if len(samples) % 20 == 0:
                print(samples[-1], flush=True)
            time.sleep(1)
        live.end()
        if live.ended()["code"] != 0:
            raise RuntimeError(live.text[-3000:])
        saved = [each for each in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if each["event"] == "saved"]
    # The last samples are of a run that ends.
    own_bytes = size(Path(saved[-1]["path"]))
    return [each for each in samples if each["step"] < steps], own_bytes, len(saved), time.monotonic() - begun


def sample(process: int) -> dict[str, float]:
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return {
        "resident": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(list((folder / "fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def step_of(run: Path) -> int:
    """The step the run has logged last."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def size(folder: Path) -> int:
    """Bytes of the files below a folder, of which some may vanish meanwhile."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(where) / name).stat().st_size
    return total


if __name__ == "__main__":
    main()
