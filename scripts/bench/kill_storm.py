"""Kill training runs at random times with SIGKILL, start them again until they are done, and count what was lost.

A kill takes all ranks, one rank or torchrun, up to 3 s after the run went on, or while it is still loading. Files of rank 1
take up to 1 s longer to reach the disk than those of rank 0, drawn anew for each start. Lost is a run whose next start did not
go on, or went on from something older than the newest checkpoint that the run had called saved. Every step that is done twice
must have one loss, bit for bit. Beside it the same kills of a loop that saves with plain DeepSpeed, as its documentation shows
(plain_deepspeed.py): there a kill of the launcher is one of all ranks, since its workers would live on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from common import finish, goal, versions
from forks import Command
from storms import STEP_SECONDS, STEPS, Outcome, blows, our_losses, ours, storm

PLAIN = Path(__file__).parent / "plain_deepspeed.py"
OURS = {
    "ZeRO-2, in the background": ({"zero_optimization": {"stage": 2}}, {}),
    "ZeRO-3, in the background": (
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        {},
    ),
    "ZeRO-2 with the optimizer on the CPU, training waits": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {"checkpoint": {"background": False}},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=18, help="of runs of ours, shared out among the layouts (default 18)")
    parser.add_argument("--control", type=int, default=12, help="of the loop with plain DeepSpeed (default 12)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 kills of each; prints, writes no results")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills = arguments.control = 3
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as scratch:
        share = -(-arguments.kills // len(OURS))
        for number, (name, (deepspeed, sections)) in enumerate(OURS.items()):
            folder = Path(scratch) / f"ours_{number}"
            chosen = blows(share, arguments.seed + number, launcher_every=6)
            found[f"ds_trainer, {name}"] = storm(folder, ours(folder, deepspeed, **sections), our_losses, chosen, tell(name))
        if arguments.control:
            folder = Path(scratch) / "plain"
            folder.mkdir()
            chosen = [
                replace(each, target="all ranks" if each.target == "launcher" else each.target)
                for each in blows(arguments.control, arguments.seed, launcher_every=6)
            ]
            found["plain DeepSpeed, ZeRO-2"] = storm(folder, plain, plain_losses, chosen, tell("plain"))
    report(found, arguments.seed, quick=arguments.quick)


def tell(name: str):
    return lambda line: print(f"{name}: {line}", flush=True)


def plain(run: Path, skew: float) -> Command:
    return Command(
        [str(run), str(STEPS), str(STEP_SECONDS)],
        ranks=2,
        environment={"SKEW": f"{skew:.3f}"},
        script=str(PLAIN),
    )


def plain_losses(run: Path) -> list[tuple[int, str]]:
    if not (run / "losses.jsonl").exists():
        return []
    return [(line["step"], line["loss"]) for line in map(json.loads, (run / "losses.jsonl").read_text().splitlines())]


def report(found: dict[str, Outcome], seed: int, *, quick: bool) -> None:
    rows = [
        [name, each.kills, len(each.lost), each.goes_on, each.runs, each.steps_done_twice, each.different]
        for name, each in found.items()
    ]
    of_ours = [each for name, each in found.items() if name.startswith("ds_trainer")]
    kills, lost = sum(each.kills for each in of_ours), sum(len(each.lost) for each in of_ours)
    different, again = sum(each.different for each in of_ours), sum(each.steps_done_twice for each in of_ours)
    finish(
        "kill_storm",
        quick=quick,
        goals=[
            goal("random kills survived", kills, kills - lost, f"of {kills}", at_least=True),
            goal("steps that were done twice and differ", 0, different, f"of {again}"),
        ],
        tables=[
            {
                "title": "Killed at random times, rank 1 up to 1 s slower on the disk",
                "columns": ["runs of", "kills", "lost", "went on", "runs", "steps done twice", "of them different"],
                "rows": rows,
            }
        ],
        packages=versions("torch", "deepspeed"),
        notes=[f"lost, {name}: {line}" for name, each in found.items() if name.startswith("ds_trainer") for line in each.lost],
        seed=seed,
    )
    sys.exit(lost > 0 or different > 0)


if __name__ == "__main__":
    main()
