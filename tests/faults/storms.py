"""Kills at random times while the disk of one rank is slower than the other's: what test_storm.py and
scripts/bench/kill_storm.py have in common.

A run is started, killed, started again and so on until it is done, then the next run begins, until all kills are dealt. What
is killed can be any program of two ranks that says "saved .../step_N" and "RESUMING from .../step_N".
"""

from __future__ import annotations

import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crash_points import GOES_ON, last_words
from forks import Command, Forks, Kill, Shown
from helpers import metrics, write_corpus, write_run
from live import LiveRun, launched, send

RANKS = {"all ranks": [0, 1], "rank 0": [0], "rank 1": [1]}
SAVED = re.compile(r"saved \S*step_(\d+)")
STEPS = 40
STEP_SECONDS = 0.1
"""A step is at least as long, so that a kill does not always find a run that waits for a save."""


@dataclass(frozen=True)
class Blow:
    """A SIGKILL: for whom and when."""

    target: str
    """`all ranks`, `rank 0`, `rank 1` or `launcher`."""
    in_start: bool
    """Counted from the start of the processes; otherwise from the moment the run goes on, or has saved for the first time."""
    after: float
    """Seconds."""
    skew: float
    """Seconds that each file of rank 1 takes longer to reach the disk."""


@dataclass
class Outcome:
    """What a storm came to."""

    kills: int
    goes_on: int
    """Starts that had something to go on from, and did."""
    lost: list[str]
    """Starts that had, and did not, or went on from something older: each run is over then, unless somebody repairs it."""
    runs: int
    steps_done_twice: int
    different: int
    """Steps that had more than one loss, or another than in a run that nothing disturbed."""


def blows(number: int, seed: int, *, launcher_every: int = 0, in_start_every: int = 6) -> list[Blow]:
    """Draw kills.

    Args:
        number: how many.
        seed: of the draw.
        launcher_every: every so many go to the launcher, 0 for none.
        in_start_every: every so many come while the start is still loading.
    """
    drawn = random.Random(seed)
    found = []
    for each in range(1, number + 1):
        target, skew = drawn.choice(list(RANKS)), drawn.uniform(0, 1)
        in_start = each % in_start_every == 0
        after = drawn.uniform(0, 4) if in_start else drawn.uniform(0.1, 3)
        found.append(Blow(target, in_start, after, skew))
        if launcher_every and each % launcher_every == 0:
            found[-1] = replace(found[-1], target="launcher", in_start=False)
    return found


def storm(
    folder: Path,
    command: Callable[[Path, float], Command],
    losses: Callable[[Path], list[tuple[int, str]]],
    blows: Sequence[Blow],
    tell: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Deal the blows to runs of a program, one start after the other.

    Args:
        folder: for the runs.
        command: run folder, skew -> how a run is started.
        losses: run folder -> step and loss as hex, in the order they were logged.
        blows: of `blows`.
        tell: takes a line of progress.
    """
    runs, kills, goes_on, lost = [folder / "run_0"], 0, 0, []
    newest: int | None = None
    with Forks(folder) as forks:
        straight = forks.run(command(folder / "straight", 0.0))
        assert straight.codes == [0, 0], straight.text
        for number, blow in enumerate([*blows, None]):
            shown = strike(
                forks, command(runs[-1], blow.skew if blow else 0.0), blow, "RESUMING" if newest else "saved ", folder
            )
            is_done, found = set(shown.codes) == {0}, GOES_ON.search(shown.text)
            was_killed = -9 in shown.codes
            kills += was_killed
            what = f"{number + 1} {blow}: codes {shown.codes}, {shown.seconds:.1f} s, {found[0] if found else 'from the start'}"
            if newest and not (found and int(found[1]) >= newest) and not (blow and blow.in_start and was_killed and not found):
                lost.append(f"{what}: {last_words(shown)}")
                what += " LOST"
            goes_on += newest is not None and found is not None
            tell(what)
            newest = max([newest or 0, *map(int, SAVED.findall(shown.text))]) or None
            if is_done or what.endswith("LOST"):
                runs.append(folder / f"run_{len(runs)}")
                newest = None
            elif blow is None:
                lost.append(f"{what}: did not come to its end: {last_words(shown)}")
    expected = dict(losses(folder / "straight"))
    again, different = 0, 0
    runs = [run for run in runs if run.exists()]
    for run in runs:
        seen = defaultdict(list)
        for step, loss in losses(run):
            seen[step].append(loss)
        again += sum(len(each) - 1 for each in seen.values())
        different += sum(set(each) != {expected[step]} for step, each in seen.items())
    return Outcome(kills, goes_on, lost, len(runs), again, different)


def strike(forks: Forks, command: Command, blow: Blow | None, moment: str, folder: Path) -> Shown:
    """Start a command and kill it when the moment has come; without a blow let it run."""
    if blow is None:
        return forks.run(command)
    if blow.target != "launcher":
        kill = Kill(RANKS[blow.target], "" if blow.in_start else moment, blow.after)
        return forks.run(replace(command, kill=kill))
    begun = time.monotonic()
    fault = command.environment["DS_TRAINER_FAULT"]
    with LiveRun(launched("torchrun", *command.arguments), cwd=folder, folder=folder, fault=fault) as live:
        live.wait_until(lambda: moment in live.text or live.process.poll() is not None, moment)
        time.sleep(blow.after)
        send([live.process.pid], 9)
        live.end()
        return Shown(live.text, [live.process.wait()], time.monotonic() - begun)


def ours(folder: Path, deepspeed: dict, **sections: dict) -> Callable[[Path, float], Command]:
    """How a run of ds_trainer is started in a storm: saves every second step."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    write_corpus(corpus)

    def command(run: Path, skew: float) -> Command:
        config = write_run(
            corpus,
            folder,
            run.name,
            train={"max_steps": STEPS, "schedule": "cosine", "warmup_steps": 2},
            checkpoint={"every_steps": 2, "folder": str(run), **sections.get("checkpoint", {})},
            deepspeed=deepspeed,
            **{name: values for name, values in sections.items() if name != "checkpoint"},
        )
        fault = f"save_before_fsync:1=sleep={skew:.3f},training=sleep={STEP_SECONDS}"
        return Command(["train", "--config", str(config)], ranks=2, environment={"DS_TRAINER_FAULT": fault})

    return command


def our_losses(run: Path) -> list[tuple[int, str]]:
    if not (run / "metrics.jsonl").exists():
        return []
    return [(line["step"], line["loss"].hex()) for line in metrics(run)]
