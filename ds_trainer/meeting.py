"""Meet in a store that may hold what an earlier start of the same run left there.

torchrun keeps its store when it starts workers again, and its restart count differs between nodes. A rank that is quicker than
rank zero would read the addresses of the dead: "connection refused" with gloo, a hang with NCCL. So the ranks first agree on a
name that no earlier start had, and keep everything else under it.

Source: torch 2.13, elastic/rendezvous/dynamic_rendezvous.py `next_rendezvous` (the store is made anew only where rank zero
moved to another agent); https://github.com/pytorch/pytorch/issues/167288. Seen in tests/cluster.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from typing import Protocol

from ds_trainer.errors import HangError

_POLL_SECONDS = 0.05


class Store(Protocol):
    """What is needed of `torch.distributed.Store`."""

    def get(self, key: str, /) -> bytes: ...  # noqa: D102
    def set(self, key: str, value: str, /) -> None: ...  # noqa: D102
    def check(self, keys: list[str], /) -> bool: ...  # noqa: D102


def meet(store: Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """Wait for all ranks of this start. Collective.

    Each rank leaves a word of its own, and rank zero answers it with the name; a rank that died and came back has another word,
    and is answered again. Who has the answer says so under the name. When all have, rank zero opens the meeting.

    Returns:
        The name of this meeting, the same on all ranks: a prefix for all further keys.

    Raises:
        HangError: not all ranks came in time. On rank zero the text names those that are missing.
    """
    deadline = time.monotonic() + timeout_seconds

    def wait_for(missing: Iterable[int]) -> None:
        if time.monotonic() > deadline:
            who = f"ranks {', '.join(map(str, list(missing)[:8]))}" if rank == 0 else "rank 0"
            raise HangError(
                f"{who} of {world_size} did not arrive within train.collective_timeout_seconds = {timeout_seconds:.0f}. "
                "Was every node started, for the same number of nodes, and can all reach MASTER_ADDR? See `ds_trainer doctor`."
            )
        time.sleep(_POLL_SECONDS)

    return _open(store, world_size, wait_for) if rank == 0 else _enter(store, rank, wait_for)


def _open(store: Store, world_size: int, wait_for: Callable[[Iterable[int]], None]) -> str:
    name = uuid.uuid4().hex
    while missing := [rank for rank in range(1, world_size) if not _is_here(store, name, rank)]:
        wait_for(missing)
    store.set(f"{name}/open", "")
    return name


def _is_here(store: Store, name: str, rank: int) -> bool:
    if not store.check([f"word/{rank}"]):
        return False
    word = store.get(f"word/{rank}").decode()
    if store.check([f"{name}/{word}"]):
        return True
    store.set(f"answer/{word}", name)
    return False


def _enter(store: Store, rank: int, wait_for: Callable[[Iterable[int]], None]) -> str:
    word, name = uuid.uuid4().hex, ""
    store.set(f"word/{rank}", word)
    while not (name and store.check([f"{name}/open"])):
        if store.check([f"answer/{word}"]) and (answer := store.get(f"answer/{word}").decode()) != name:
            name = answer
            store.set(f"{name}/{word}", "")
        wait_for([0])
    return name
