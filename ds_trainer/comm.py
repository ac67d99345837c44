"""The few collectives the project uses, and the start and end of the process group.

Every function here that says "collective" must be called by every rank, in the same order. No other module calls
`torch.distributed`, so that this file is the whole list of places where ranks wait for one another.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ds_trainer.meeting import meet

T = TypeVar("T")

HOST = "host"
"""The group of the main threads, without the device."""
BACKGROUND = "background"
"""The group of the threads that write checkpoints."""
_groups: dict[str, Any] = {}


def device_of(local_rank: int) -> torch.device:
    """The device this rank computes on: its GPU where there is one, else the CPU.

    Raises:
        IndexError: there are fewer GPUs than ranks on this host.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise IndexError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible on this host")
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(device: torch.device, *, rank: int, world_size: int, timeout_seconds: float) -> Iterator[None]:
    """Start the process group, from MASTER_ADDR and MASTER_PORT, and end it. Collective.

    After an error the group is left as it is: ending it would wait for ranks that may be gone.

    Raises:
        HangError: not all ranks came in time.
    """
    limit = datetime.timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, *_ = next(iter(rendezvous("env://", rank, world_size, timeout=limit)))
    name = meet(PrefixStore("ds_trainer", store), rank, world_size, timeout_seconds)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(name, store),
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )
    # Two more groups, on the host: one for what the main threads agree on, one for the threads that write checkpoints.
    _groups.update({name: dist.new_group(backend="gloo", timeout=limit) for name in (HOST, BACKGROUND)})
    yield
    _groups.clear()
    dist.destroy_process_group()


def rank() -> int:
    """This process's position among all, from 0; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Collective. The sum of the ranks' tensors, on every rank; the argument is left as it is."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def largest(value: int) -> int:
    """Collective. The largest of the ranks' integers; the device is not waited for."""
    if world_size() == 1:
        return value
    box = torch.tensor([value])
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_groups.get(HOST))
    return int(box)


def gather_objects(value: T, group: str | None = None) -> list[T]:
    """Collective. One small object of each rank, by rank, on every rank.

    Args:
        value: anything that can be pickled.
        group: HOST or BACKGROUND; by default the group that trains.
    """
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_groups.get(group or ""))
    return gathered


def from_rank_zero(value: T) -> T:
    """Collective. Rank zero's object, on every rank; what the others pass is ignored."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]
