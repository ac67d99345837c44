"""Runs once for each slot of each host: the collectives of ZeRO at growing sizes, and how fast each rank is alone.

All ranks leave a collective at about the same time, so that it does not tell who is slow. What each rank does alone does: a
product of matrices.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median_high
from typing import Any

import torch
from torch import Tensor

from ds_trainer import comm
from ds_trainer.doctor.probe import say

SIZES = {"cpu": (1 << 12, 1 << 20, 16 << 20), "cuda": (1 << 12, 1 << 20, 16 << 20, 256 << 20)}
"""Bytes of the whole tensor, by device."""
SIDE = {"cpu": 384, "cuda": 8192}
"""Of the matrices, by device."""
ROUNDS = 5


def collectives(mine: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed: name -> what to run on this rank's tensor, whose length is a multiple of the number of ranks."""
    part = mine[: len(mine) // comm.world_size()]
    return {
        "all-reduce": lambda: comm.sum_over_ranks(mine),
        "all-gather": lambda: comm.gather_parts(part),
        "reduce-scatter": lambda: comm.scatter_sums(mine),
    }


def bus_bytes(name: str, num_bytes: int, ranks: int) -> float:
    """What the slowest link carries, in bytes, when a collective over a tensor of so many bytes is done well.

    Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    return (2 if name == "all-reduce" else 1) * (ranks - 1) / ranks * num_bytes


def right(mine: Tensor) -> bool:
    """Whether all three give this rank what they should, where each rank's tensor is its number from 1. Collective."""
    summed, gathered, scattered = (run() for run in collectives(mine).values())
    ranks = torch.arange(comm.world_size(), device=mine.device) + 1.0
    sums = torch.cat([summed, scattered])
    return bool((sums == ranks.sum()).all() and (gathered.view(len(ranks), -1) == ranks[:, None]).all())


def measure(device: torch.device) -> dict[str, Any]:
    """Time every collective at every size. Collective.

    Returns:
        The table on every rank: `bandwidth` is [name, bytes, seconds, bytes/s of the bus], `alone` seconds by rank.
    """
    ranks = comm.world_size()
    rows, is_right = [], True
    for size in SIZES[device.type]:
        mine = torch.full((size // 4 // ranks * ranks,), comm.rank() + 1.0, device=device)
        is_right &= right(mine)
        for name, run in collectives(mine).items():
            run()
            seconds = []
            for _ in range(ROUNDS):
                comm.wait_for_all()
                began = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            took = max(comm.gather_objects(median_high(seconds)))
            rows.append([name, size, took, bus_bytes(name, size, ranks) / took])
        if comm.rank() == 0:
            say({"say": f"collectives of {size >> 10} KiB done"})
    wrong = [rank for rank, each in enumerate(comm.gather_objects(is_right)) if not each]
    return {"bandwidth": rows, "alone": comm.gather_objects(alone(device)), "wrong": wrong, "device": device.type}


def alone(device: torch.device) -> float:
    """Seconds for a product of matrices on this rank, while all others do the same: the best of some. Collective."""
    side = SIDE[device.type]
    left = torch.ones(side, side, device=device)
    seconds = []
    left @ left
    comm.wait_for_all()
    for _ in range(2 * ROUNDS):
        began = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main(timeout_seconds: float) -> None:
    """Meet the other ranks, measure, and let rank zero answer. Collective."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = comm.device_of(int(os.environ["LOCAL_RANK"]))
    with comm.process_group(device, rank=rank, world_size=world_size, timeout_seconds=timeout_seconds):
        found = measure(device)
    say(found if rank == 0 else {"done": True})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
