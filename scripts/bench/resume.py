"""How long it takes to go on in the data after k consumed rows, and how much has to be kept for it.

Ours: the one number `rows_consumed`; files are opened and the first window is read through `loader.windows`. Checked before:
from each k on, 8 windows hold the rows of the uninterrupted run, also on 4 ranks instead of one. To 1e4 the uninterrupted run
is read from its beginning; for a larger k the rows are those that the order names.
Beside it, on in-memory rows that cost nothing to read: `accelerate.skip_first_batches` on an iterable DataLoader (it reads
and drops what was consumed) and torchdata's StatefulDataLoader on a shuffled list of rows (it draws the permutation again).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    SCRATCH,
    finish,
    goal,
    in_child,
    lengths_of,
    make_rows,
    open_rows,
    parse_arguments,
    peers_python,
    take_turns,
    versions,
)

from ds_trainer.data.loader import windows
from ds_trainer.data.order import Order

MICRO_BATCH, NUM_ROWS = 8, 10**6


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.child:
        print(json.dumps(stateful(*map(int, arguments.child))))
        return
    consumed = [10**2, 10**4, 10**5 if arguments.quick else 10**6]
    folder = make_rows("resume", lengths_of("chat-like", 10**5), 2048)
    for position in consumed:
        check(folder, position)

    rows: list[list[Any]] = []
    goals = []
    took = take_turns(
        {str(position): lambda position=position: next(loader_of(folder, position)) for position in consumed},
        repeats=7,
        each_at_least=0.1,
    )
    state = {str(position): len(json.dumps({"rows_consumed": position})) for position in consumed}
    for name, each in took.items():
        rows.append(["ours", int(name), each["wall_s"] * 1e3, state[name]])
        goals.append(goal(f"ours, after {int(name):,} rows", 10, each["wall_s"] * 1e3, "ms"))
    goals.append(goal("ours, state", 2000, max(state.values()), "bytes"))

    for position in consumed:
        rows.append(["accelerate.skip_first_batches, iterable", position, skipping(position) * 1e3, len(json.dumps(position))])
    packages = versions("torch", "accelerate")
    python = peers_python()
    for position in consumed if python else ():
        try:
            found = in_child(__file__, NUM_ROWS, position, python=python)
        except RuntimeError as error:
            print(f"torchdata is left out: {error}")
            break
        packages["torchdata"] = found["torchdata"]
        rows.append([f"torchdata StatefulDataLoader, {NUM_ROWS:,} rows", position, found["seconds"] * 1e3, found["state"]])
    table = {
        "title": f"From nothing to the next batch of {MICRO_BATCH} rows",
        "columns": ["who", "rows consumed", "ms, wall", "bytes of state"],
        "rows": rows,
    }
    finish("resume", quick=arguments.quick, goals=goals, tables=[table], packages=packages)


def loader_of(
    folder: Path, position: int, *, rank: int = 0, ranks: int = 1, micro_batch_size: int = MICRO_BATCH
) -> Iterator[Any]:
    """Opens the files, too."""
    rows = open_rows(folder)
    return windows(
        rows,
        Order(num_rows=(rows.num_rows,), seed=3, total_rows=None),
        first_position=position,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=1,
        rank=rank,
        data_parallel_size=ranks,
        convert=lambda batch: batch,
    )


def check(folder: Path, position: int) -> None:
    """64 rows from a position on: from a loader that starts there, from 4 ranks, and from one that comes from before."""
    count = 64 // MICRO_BATCH
    own = loader_of(folder, position)
    found = torch.cat([next(own)[0].input_ids for _ in range(count)])
    ranks = [loader_of(folder, position, rank=rank, ranks=4, micro_batch_size=2) for rank in range(4)]
    elsewhere = torch.cat([next(loader)[0].input_ids for _ in range(count) for loader in ranks])
    assert torch.equal(found, elsewhere)
    if position <= 10**4:  # read everything before it; a larger one would take a minute
        uninterrupted = loader_of(folder, position % MICRO_BATCH)
        for _ in range(position // MICRO_BATCH):
            next(uninterrupted)
        assert torch.equal(found, torch.cat([next(uninterrupted)[0].input_ids for _ in range(count)]))
    else:
        rows = open_rows(folder)
        order = Order(num_rows=(rows.num_rows,), seed=3, total_rows=None)
        expected = [order.row_at(position + index) for index in range(64)]
        assert torch.equal(found, rows.read(expected).input_ids)


class Rows(torch.utils.data.IterableDataset):
    """The same small tensor again and again: what reading costs at the least."""

    def __init__(self) -> None:
        self.row = torch.arange(32)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(10**9):
            yield self.row


def skipping(position: int) -> float:
    import accelerate

    loader = torch.utils.data.DataLoader(Rows(), batch_size=MICRO_BATCH)
    run = {"skip": lambda: next(iter(accelerate.skip_first_batches(loader, position // MICRO_BATCH)))}
    return float(take_turns(run, repeats=3 if position < 10**6 else 1)["skip"]["wall_s"])


def stateful(count: int, position: int) -> dict[str, Any]:
    """In the environment of the other projects."""
    import importlib.metadata

    from torchdata.stateful_dataloader import StatefulDataLoader

    data = torch.utils.data.TensorDataset(torch.arange(count))

    def loader() -> Any:
        return StatefulDataLoader(data, batch_size=MICRO_BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))

    first = loader()
    batches = iter(first)
    for _ in range(position // MICRO_BATCH - 1):
        next(batches)
    next(batches)
    state = first.state_dict()
    with tempfile.TemporaryFile() as file:
        torch.save(state, file)
        size = file.tell()
    expected = next(batches)[0] if position < count else None

    def resume() -> None:
        again = loader()
        again.load_state_dict(state)
        found = next(iter(again), None)
        assert expected is None or torch.equal(found[0], expected)

    took = take_turns({"resume": resume}, repeats=3)["resume"]["wall_s"]
    return {"seconds": took, "state": size, "torchdata": importlib.metadata.version("torchdata")}


if __name__ == "__main__":
    SCRATCH.mkdir(parents=True, exist_ok=True)
    main()
