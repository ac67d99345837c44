"""A run that is killed at every point of its saves in turn, and started again after each: what test_crashes.py and
scripts/bench/crash_points.py have in common.

Each start goes on from what the kill before it left, and is killed itself in its first save. At the end the run is finished and
every step that was ever done, some of them many times, must have had one loss: that of a run which nothing disturbed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forks import Command, Forks, Shown
from helpers import metrics, write_corpus, write_run

ON_EVERY_RANK = ("saving", "save_half_written", "save_before_fsync", "save_written", "save_voted", "save_done")
ON_RANK_ZERO = (
    "save_begin",
    "save_folder_made",
    "save_before_manifest",
    "save_manifest_written",
    "save_before_rename",
    "save_renamed",
    "save_before_latest",
    "save_before_prune",
    "save_half_pruned",
)
CASES = [
    *[(f"{point}, {who}", fault.format(point)) for point in ON_EVERY_RANK for who, fault in (
        ("rank 0", "{}:0=kill"),
        ("rank 1", "{}:1=kill"),
        ("both ranks", "{}=kill"),
    )],
    *[(f"{point}, {who}", fault.format(point)) for point in ON_RANK_ZERO for who, fault in (
        ("rank 0", "{}:0=kill"),
        ("rank 0, and rank 1 as it waits", "{}:0=kill,save_voted:1=kill"),
    )],
]  # fmt: skip
"""(what is killed where, the fault that does it): 36 of them."""

GOES_ON = re.compile(r"RESUMING from \S*step_(\d+)")


@dataclass(frozen=True)
class Outcome:
    """What the starts after the kills came to."""

    resumed: dict[str, str]
    """Kill -> what the start after it said of where it went on, or its last words when it did not."""
    failed: list[str]
    """Kills after which no start went on, or one went on from something older than the checkpoint that was complete."""
    steps_done_twice: int
    different: list[int]
    """Steps that had more than one loss, or another than in the undisturbed run."""


def crash(
    folder: Path,
    cases: Sequence[tuple[str, str]],
    deepspeed: dict,
    *,
    background: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Kill a run at each of some points, one after the other, and judge what the next starts made of it."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    write_corpus(corpus)
    train = {"max_steps": len(cases) + 4, "schedule": "cosine", "warmup_steps": 2}
    checkpoint = {"every_steps": 1, "keep_last": 2, "background": background}

    def config(name: str) -> str:
        own = {**checkpoint, "folder": str(folder / name)}
        return str(write_run(corpus, folder, name, train=train, deepspeed=deepspeed, checkpoint=own))

    commands = {"straight": Command(["train", "--config", config("straight")], ranks=2)}
    killed = ["train", "--config", config("killed")]
    commands["first"] = Command(killed, ranks=2, environment={"DS_TRAINER_FAULT": "training::3=exit=9"})
    for name, fault in cases:
        commands[name] = Command(killed, ranks=2, environment={"DS_TRAINER_FAULT": fault})
    commands["last"] = Command(killed, ranks=2)
    shown = {}
    with Forks(folder) as forks:
        for number, (name, command) in enumerate(commands.items(), 1):
            shown[name] = forks.run(command)
            tell(f"{number}/{len(commands)} {name}: codes {shown[name].codes}, {shown[name].seconds:.1f} s")
    if shown["straight"].codes != [0, 0]:
        raise AssertionError(shown["straight"].text)

    resumed, failed = {}, []
    names = [*commands][2:]
    older = 1
    for number, name in enumerate(names[:-1]):
        if -9 not in shown[name].codes:
            raise AssertionError(f"{name}: nothing was killed\n{shown[name].text}")
        # Removing what a kill left is a point too: a start that is killed there says nothing, the one after it does.
        after = next(each for each in names[number + 1 :] if GOES_ON.search(shown[each].text) or -9 not in shown[each].codes)
        found = GOES_ON.search(shown[after].text)
        resumed[name] = found[0] if found else last_words(shown[after])
        if found is None or int(found[1]) < older:
            failed.append(name)
        older = int(found[1]) if found else older
    if shown["last"].codes != [0, 0]:
        failed.append("last")
    losses: dict[int, set[str]] = {}
    lines = metrics(folder / "killed")
    for line in lines:
        losses.setdefault(line["step"], set()).add(line["loss"].hex())
    expected = {line["step"]: {line["loss"].hex()} for line in metrics(folder / "straight")}
    different = sorted(step for step in expected if losses.get(step) != expected[step])
    return Outcome(resumed, failed, len(lines) - len(losses), different)


def last_words(shown: Shown) -> str:
    return shown.text.strip().splitlines()[-1] if shown.text.strip() else f"nothing; codes {shown.codes}"


ZERO2 = {"zero_optimization": {"stage": 2}}
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
