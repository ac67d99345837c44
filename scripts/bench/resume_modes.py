"""Save a state after three steps, go on from it in every layout, and compare three steps with those of the run that went on.

The layouts and pairs are those of `tests/ranks/test_layouts.py`: in the same layout losses and weights must be equal bit for
bit; at another ZeRO stage, with another offload or on another number of ranks they may differ by rounding, 1e-6 in fp32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import finish, goal, versions
from test_layouts import (
    COMPILED,
    LORA,
    OFFLOAD,
    OTHER,
    OTHER_COMPILED,
    SAME,
    STAGES,
    TOLERANCE,
    the_whole_run_and_the_resumed_one,
    work,
)

SECONDS = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="also what needs compiled ops (g++, libaio; minutes at first)")
    parser.add_argument("--quick", action="store_true", help="ZeRO-1 to 3 in their own layout; prints, writes no results")
    arguments = parser.parse_args()
    same, other = [(f"{name}_of_2", name, 2) for name in SAME], list(OTHER)
    alone: tuple[str, ...] = (*STAGES, *LORA, *OFFLOAD)
    if arguments.quick:
        same, other, alone = same[:3], [], ()
    if arguments.compiled:
        same += [(f"{name}_of_2", name, 2) for name in COMPILED]
        other += OTHER_COMPILED
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        do(folder, 2, [f"save:{name}" for _, name, _ in same])
        do(folder, 1, [f"save:{name}" for name in alone])
        for ranks in (2, 1):
            do(folder, ranks, [f"resume:{state}:{name}" for state, name, on in (*same, *other) if on == ranks])
        rows = {pair: compare(folder, *pair) for pair in (*same, *other)}
    exact = sum(rows[pair]["weights"] == 0 and rows[pair]["loss"] == 0 for pair in same)
    goals = [goal("the same layout: bit for bit", len(same), exact, f"of {len(same)}", at_least=True)]
    if other:
        largest = max(rows[pair]["loss"] for pair in other)
        goals.append(goal(f"another layout, {len(other)} pairs: largest difference of a loss", TOLERANCE, largest))
    columns = ["saved in", "goes on in", "ranks", "losses", "largest difference of a weight"]
    tables = [
        {"title": "The same layout", "columns": columns, "rows": [shown(pair, rows[pair]) for pair in same]},
        {"title": "Another layout", "columns": columns, "rows": [shown(pair, rows[pair]) for pair in other]},
    ]
    finish(
        "resume_modes",
        quick=arguments.quick,
        goals=goals,
        tables=[table for table in tables if table["rows"]],
        packages=versions("torch", "deepspeed", "transformers", "peft"),
        seed=0,
    )
    sys.exit(not all(each["met"] for each in goals))


def do(folder: Path, ranks: int, tasks: list[str]) -> None:
    if tasks:
        begun = time.monotonic()
        work(folder, ranks, tasks, timeout=SECONDS)
        print(f"{len(tasks)} tasks on {ranks} ranks in {time.monotonic() - begun:.0f} s", flush=True)


def compare(folder: Path, state: str, name: str, ranks: int) -> dict[str, float]:
    """The largest difference of a loss, and of a weight."""
    losses, weights, resumed_losses, resumed_weights = the_whole_run_and_the_resumed_one(folder, state, name, ranks)
    pairs = zip(losses, resumed_losses, strict=True)
    return {
        "loss": max(abs(float.fromhex(ours) - float.fromhex(theirs)) for ours, theirs in pairs),
        "weights": max(
            0.0 if torch.equal(value, resumed_weights[each]) else float((value - resumed_weights[each]).abs().max())
            for each, value in weights.items()
        ),
    }


def shown(pair: tuple[str, str, int], found: dict[str, float]) -> list[Any]:
    state, name, ranks = pair
    before, _, of = state.rpartition("_of_")
    losses = "bit for bit" if found["loss"] == 0 else f"within {found['loss']:.1e}"
    weights = "bit for bit" if found["weights"] == 0 else f"{found['weights']:.1e}"
    return [f"{in_words(before)}, {of} {'rank' if of == '1' else 'ranks'}", in_words(name), ranks, losses, weights]


def in_words(layout: str) -> str:
    stage, *rest = layout.split("_")
    return ", ".join([f"ZeRO-{stage[-1]}", *([" ".join(rest)] if rest else [])])


if __name__ == "__main__":
    main()
