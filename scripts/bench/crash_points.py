"""Kill a run at every point of its saves in turn, start it again after each, and compare it with a run that nothing disturbed.

36 kills (each point, on rank 0, on rank 1, on both) at ZeRO-2 with saves in the background and again at ZeRO-3 with saves that
training waits for. A kill is survived when the next start goes on from a complete checkpoint that is no older than the one
before; every step that is done twice must have one loss, bit for bit. `tests/faults/test_crashes.py` takes a sample.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from common import finish, goal, versions
from crash_points import CASES, ZERO2, ZERO3, crash

LAYOUTS = {"ZeRO-2, in the background": (ZERO2, True), "ZeRO-3, training waits": (ZERO3, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every ninth point; prints, writes no results")
    arguments = parser.parse_args()
    cases = CASES[::9] if arguments.quick else CASES
    rows, notes = [], []
    for name, (zero, background) in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            outcome = crash(
                Path(scratch) / "runs",
                cases,
                zero,
                background=background,
                tell=lambda line, name=name: print(f"{name}: {line}", flush=True),
            )
        survived = len(cases) - len(outcome.failed)
        rows.append([name, survived, len(cases), outcome.steps_done_twice, len(outcome.different)])
        notes += [f"not survived: {name}, {each}: {outcome.resumed.get(each)}" for each in outcome.failed]
    tried, survived, different = (sum(row[column] for row in rows) for column in (2, 1, 4))
    finish(
        "crash_points",
        quick=arguments.quick,
        goals=[
            goal("crash points survived", tried, survived, f"of {tried}", at_least=True),
            goal("steps that were done twice and differ", 0, different, f"of {sum(row[3] for row in rows)}"),
        ],
        tables=[
            {
                "title": "Killed at each point of a save",
                "columns": ["saves", "survived", "tried", "steps done twice", "of them different"],
                "rows": rows,
            }
        ],
        packages=versions("torch", "deepspeed"),
        notes=notes,
    )
    sys.exit(survived != tried or different > 0)


if __name__ == "__main__":
    main()
