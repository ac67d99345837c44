"""Damage each file of a checkpoint in every way, and see whether the next start notices and takes the older one.

The checkpoints are those of runs of two ranks, at ZeRO-2 and at ZeRO-3. Each damage is done to a copy, and the choice is made
by the same function as in a start (`checkpoint.manager.find`). Clean copies show whether there are false alarms.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from common import finish, goal, versions
from corruptions import FILES, NEWEST, OLDER, damages, make_checkpoints, spoiled_pointers, taken_after
from crash_points import ZERO2, ZERO3
from forks import Forks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=50, help="single bits flipped in each file (default 50)")
    parser.add_argument("--clean", type=int, default=200, help="clean copies (default 200)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="5 flips, 10 clean copies; prints, writes no results")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.flips, arguments.clean = 5, 10
    tried: dict[tuple[str, str], int] = defaultdict(int)
    right: dict[tuple[str, str], int] = defaultdict(int)
    alarms, clean, missed = 0, 0, []
    with tempfile.TemporaryDirectory() as scratch:
        with Forks(Path(scratch)) as forks:
            made = [make_checkpoints(Path(scratch) / f"zero{number}", forks, zero) for number, zero in ((2, ZERO2), (3, ZERO3))]
        for checkpoints in made:
            print(f"damaging {checkpoints.parent.parent.name}", flush=True)
            for kind, file, damage in damages(arguments.flips, arguments.seed):
                taken, told = taken_after(damage, checkpoints, Path(scratch))
                tried[kind, file] += 1
                if taken == OLDER and NEWEST in told[0]:
                    right[kind, file] += 1
                else:
                    missed.append(f"{checkpoints.parent.parent.name}, {file}, {kind}: a start took {taken}")
            for kind, file, spoil in spoiled_pointers():
                tried[kind, file] += 1
                right[kind, file] += taken_after(spoil, checkpoints, Path(scratch)) == (NEWEST, [])
            for _ in range(arguments.clean // len(made)):
                clean += 1
                alarms += taken_after(lambda folder: None, checkpoints, Path(scratch)) != (NEWEST, [])
    damaged = [key for key in tried if key[1] != "latest"]
    total, found = sum(tried[key] for key in damaged), sum(right[key] for key in damaged)
    finish(
        "corruption",
        quick=arguments.quick,
        goals=[
            goal("damages noticed, and the older checkpoint taken", total, found, f"of {total}", at_least=True),
            goal("false alarms on whole checkpoints", 0, alarms, f"of {clean}"),
        ],
        tables=[
            {
                "title": "One file of the newest checkpoint was damaged: noticed, and the older one taken",
                "columns": ["damage", *FILES],
                "rows": [
                    [kind, *[f"{right[kind, file]} of {tried[kind, file]}" if (kind, file) in tried else "-" for file in FILES]]
                    for kind in dict.fromkeys(kind for kind, _ in damaged)
                ],
            },
            {
                "title": "`latest`, which a start does not need: the newest checkpoint taken",
                "columns": ["`latest` is", "right"],
                "rows": [[kind, f"{right[kind, file]} of {tried[kind, file]}"] for kind, file in tried if file == "latest"],
            },
        ],
        packages=versions("torch", "deepspeed", "safetensors"),
        notes=missed,
        seed=arguments.seed,
    )
    sys.exit(found != total or alarms > 0)


if __name__ == "__main__":
    main()
