"""What it costs to know which row comes at a position of the run: time and memory, from 1e4 to 1e9 rows.

Ours computes each index by itself. torch's RandomSampler draws a permutation of all rows first; it is measured to 1e7.
The mixtures have three sources: with the weights 0.7, 0.2 and 0.1, whose turns repeat after 10 rows, and with weights of
five digits, whose turns repeat after 100,000, the longest period there is. Each size is measured in processes of their own,
so that the first index is really the first. Checked before: each epoch of 1e4 rows is a permutation of all of them, and
every beginning of a mixture holds the sources in their shares to within one row.
"""

from __future__ import annotations

import gc
import json
import random
import time
from typing import Any

from common import MIB, finish, goal, in_child, parse_arguments, resident, versions

MIXTURES = {"ours, three sources": (0.7, 0.2, 0.1), "ours, three odd weights": (0.61803, 0.26794, 0.11403)}


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.child:
        kind, count = arguments.child
        print(json.dumps(measure(kind, int(count))))
        return
    check()
    sizes = [10**4, 10**6] if arguments.quick else [10**4, 10**5, 10**6, 10**7, 10**8, 10**9]
    rows: list[list[Any]] = []
    for count in sizes:
        for kind in ("ours", *MIXTURES, "torch RandomSampler"):
            if kind == "torch RandomSampler" and count > 10**7:
                continue
            tries = [in_child(__file__, kind, count) for _ in range(3)]
            least = {key: sorted(each[key] for each in tries)[1] for key in tries[0]}
            rows.append([count, kind, least["first_s"] * 1e3, least["random_s"] * 1e6, least["memory"] / MIB])
    goals = []
    for kind in ("ours", *MIXTURES):
        own = [row for row in rows if row[1] == kind]
        what = kind.removeprefix("ours").removeprefix(", ") or "one pool"
        goals += [
            goal(f"{what}: first index, at any size", 1, max(row[2] for row in own), "ms"),
            goal(f"{what}: any other index", 1, max(row[3] for row in own) / 1e3, "ms"),
            goal(f"{what}: memory", 1, max(row[4] for row in own), "MiB"),
        ]
    table = {
        "title": "One index: the median of three processes",
        "columns": ["rows", "who", "first index, ms", "a random index, us", "memory, MiB"],
        "rows": rows,
    }
    note = "torch's sampler cannot give an index without those before it; its random index is the next one of its list."
    finish("order", quick=arguments.quick, goals=goals, tables=[table], packages=versions("torch"), notes=[note])


def check() -> None:
    from ds_trainer.data.order import Order

    count = 10**4
    order = Order(num_rows=(count,), seed=1, total_rows=None)
    epochs = [[order.row_at(epoch * count + index) for index in range(count)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    for weights in MIXTURES.values():
        mixture = Order(num_rows=(count, count, count), weights=weights, seed=1, total_rows=None)
        sources = [(mixture.row_at(position) or 0) // count for position in range(5000)]
        for length in (1, 10, 1000, 2500, 5000):
            for source, weight in enumerate(weights):
                assert abs(sources[:length].count(source) - weight * length) < 1


def measure(kind: str, count: int) -> dict[str, float]:
    """Seconds to a first index, from a new object; seconds of another one; bytes above what the process held before."""
    if kind == "torch RandomSampler":
        return measure_torch(count)
    from ds_trainer.data.order import Order

    numbers = random.Random(0)
    gc.collect()
    before = resident()
    begun = time.perf_counter()
    if kind == "ours":
        order = Order(num_rows=(count,), seed=1, total_rows=None)
    else:
        order = Order(num_rows=(count, count // 2, count // 4), weights=MIXTURES[kind], seed=1, total_rows=None)
    order.row_at(0)
    first = time.perf_counter() - begun
    positions = [numbers.randrange(count) for _ in range(2000)]
    begun = time.perf_counter()
    for position in positions:
        order.row_at(position)
    return {"first_s": first, "random_s": (time.perf_counter() - begun) / len(positions), "memory": resident() - before}


def measure_torch(count: int) -> dict[str, float]:
    import torch
    from torch.utils.data import RandomSampler

    next(iter(RandomSampler(range(2), generator=torch.Generator().manual_seed(0))))
    gc.collect()
    before = resident()
    begun = time.perf_counter()
    indices = iter(RandomSampler(range(count), generator=torch.Generator().manual_seed(0)))
    next(indices)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(2000):
        next(indices)
    return {"first_s": first, "random_s": (time.perf_counter() - begun) / 2000, "memory": resident() - before}


if __name__ == "__main__":
    main()
