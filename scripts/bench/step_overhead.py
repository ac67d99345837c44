"""What our loop adds to a step of DeepSpeed: `ds_trainer train` beside a loop around `deepspeed.initialize` written by hand.

Both train the same model in bf16 on the same rows with the same loss and the same optimizer object; their losses must be equal
in every bit before and after they are timed. They take turns, each in a process of its own. Ours is the command a user types,
held up between two steps: it reads its rows from the disk, counts targets over all ranks, asks whether to stop, logs in every
turn (every one to three steps; the default is every tenth), and is watched for hangs. The other one is given its rows in memory
and does nothing but steps.
Beside it, what the parts of our loop cost that the other one does not have, on one rank and on two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from common import SCRATCH, child_environment, finish, goal, parse_arguments, versions
from turns import LARGE, SMALL, Live, compare, llama, write_case, write_texts

HOW = {"ZeRO-2": (2, False), "ZeRO-3": (3, False), "ZeRO-2, optimizer on cpu": (2, True)}
CASES = [
    # model, micro-batch, positions, how, accumulation, ranks, steps of a turn, turns
    *((SMALL, 2, 256, how, 1, 1, 3, 20) for how in HOW),
    *((SMALL, 2, 256, how, 4, 1, 1, 16) for how in HOW),
    (SMALL, 2, 256, "ZeRO-2", 1, 2, 3, 12),
    *((LARGE, 4, 512, how, 1, 1, 1, 8) for how in HOW),
    (LARGE, 4, 512, "ZeRO-2", 4, 1, 1, 4),
]


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.child:
        child(int(arguments.child[0]))
        return
    SCRATCH.mkdir(parents=True, exist_ok=True)
    rows: list[list[Any]] = []
    goals = []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        corpus = write_texts(Path(scratch) / "corpus")
        for number, (model, micro, seq_len, how, accumulation, ranks, steps, turns) in enumerate(CASES):
            if arguments.quick and number not in (0, 1):
                continue
            stage, offload = HOW[how]
            config = write_case(
                corpus,
                Path(scratch),
                f"case_{number}",
                model=llama(*model[1:]),
                micro=micro,
                seq_len=seq_len,
                stage=stage,
                accumulation=accumulation,
                offload=offload,
                log_every=steps,
            )
            with ExitStack() as stack:
                lives = {who: stack.enter_context(Live(who, config, ranks=ranks)) for who in ("bare", "ours")}
                found, compared = compare(
                    lives, steps=steps, turns=4 if arguments.quick else turns, warm_up=2, equal=("bare", "ours")
                )
            bare, ours = found["bare"], found["ours"]
            name = f"{model[0]}, {how}, accumulation {accumulation}, {ranks} {'rank' if ranks == 1 else 'ranks'}"
            added = (ours["ratio"] - 1) * bare["cpu_s"] * 1e3
            rows.append([model[0], f"{micro} x {seq_len}", how, accumulation, ranks, bare["cpu_s"] * 1e3, ours["cpu_s"] * 1e3])
            rows[-1] += [ours["ratio"], ours["ratio_wall"], added, compared]
            goals.append(goal(name, 1.02, ours["ratio"], "of bare DeepSpeed's step"))
            print(rows[-1], flush=True)
    tables = [
        {
            "title": "CPU ms a step of all ranks; ratio: the median over turns of ours to the bare loop's beside it",
            "columns": [
                *("parameters", "micro-batch", "how", "accumulation", "ranks", "bare, ms", "ours, ms"),
                *("ratio", "ratio, wall", "added, ms", "losses equal in every bit"),
            ],
            "rows": rows,
        },
        {
            "title": "What a step of ours does besides, microseconds of wall time a call, median",
            "columns": ["what", "1 rank", "2 ranks"],
            "rows": parts(),
        },
    ]
    finish(
        "step_overhead",
        quick=arguments.quick,
        goals=goals,
        tables=tables,
        packages=versions("torch", "deepspeed", "transformers"),
    )


def parts() -> list[list[Any]]:
    """Each part of our loop by itself, on one rank and on two."""
    found = []
    for ranks in (1, 2):
        command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), __file__, "--child", str(ranks)]
        environ = child_environment() | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return [[what, found[0][what], found[1][what]] for what in found[0]]


def child(ranks: int) -> None:
    """Measured by rank zero; the ranks wait for each other before each call, so that nobody's delay counts."""
    import torch

    from ds_trainer import comm, whereabouts
    from ds_trainer.engine.pace import Pace
    from ds_trainer.state import seed_step

    cpu = torch.device("cpu")
    counts = torch.tensor([100, 100])
    leaves = torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in range(64)))
    numbers = torch.zeros(1, 1)
    pace = Pace(leaves, cpu)

    def paced() -> None:
        with pace.measured():
            leaves(numbers)

    calls: dict[str, Callable[[], Any]] = {
        "asking all ranks whether to stop": lambda: comm.largest(0),
        "summing targets and tokens over the ranks": lambda: comm.sum_over_ranks(counts),
        "seeding the step": lambda: seed_step(0, 1, 0, cpu),
        "not done any more: torch.manual_seed": lambda: torch.manual_seed(1),
        "saying where the rank is, 7 times": lambda: [whereabouts.at("measuring") for _ in range(7)],
        "forward of 64 modules with their pace measured": paced,
        "forward of 64 modules without": lambda: leaves(numbers),
    }
    with comm.process_group(cpu, rank=int(os.environ["RANK"]), world_size=ranks, timeout_seconds=60):
        found = {}
        for what, call in calls.items():
            took = []
            for _ in range(300):
                comm.wait_for_all()
                begun = time.perf_counter()
                call()
                took.append(time.perf_counter() - begun)
            found[what] = median(took) * 1e6
        if comm.rank() == 0:
            print(json.dumps(found))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
