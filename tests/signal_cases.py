"""Signals x phases x targets x launchers: each case, and what is to come of it."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from live import LiveRun, launched, send

PHASES = {
    "tokenising": "tokenising=sleep=3",
    "loading": "loading=sleep=3",
    "training": "training::3=sleep=2",
    "evaluating": "evaluating::4=sleep=0.2",
    "saving": "saving::4=sleep=2",
}
"""The fault point that keeps a run in the phase. Training is held up in its third step, the rest comes after the fourth."""
LAUNCHERS = ("torchrun", "deepspeed")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TARGETS = ("rank 0", "rank 1", "all", "launcher")


@dataclass(frozen=True)
class Case:
    launcher: str
    phase: str
    target: str
    signal: signal.Signals

    def __str__(self) -> str:
        return f"{self.launcher}, {self.phase}, {self.signal.name} to {self.target}"

    @property
    def step(self) -> int | None:
        """The checkpoint that must be there."""
        return {"training": 3, "evaluating": 4, "saving": 4}.get(self.phase)

    @property
    def codes(self) -> set[int]:
        """What exit.json may say. Ctrl-C before training asks for no requeue, where rank 0 sees more of it than others' end."""
        if self.step is not None or self.signal != signal.SIGINT:
            return {75}
        if self.target == "launcher" and self.launcher == "deepspeed":
            return {75}
        return {130, 75} if self.target == "rank 1" else {130}


def all_cases() -> list[Case]:
    """Launchers die of SIGUSR1 themselves, so that one goes to ranks."""
    every = product(LAUNCHERS, PHASES, TARGETS, SIGNALS)
    return [Case(*each) for each in every if not (each[2] == "launcher" and each[3] == signal.SIGUSR1)]


def run_case(case: Case, config: Path, cwd: Path) -> dict[str, Any]:
    """Start, wait for the phase, send the signal, wait for the end.

    Returns:
        What happened: `seconds` to the end, `code` and `step` of exit.json, `wrong`, a list of what should not be.
    """
    folder = Path(yaml.safe_load(config.read_text())["checkpoint"]["folder"])
    command = launched(case.launcher, "train", "--config", str(config))
    with LiveRun(command, cwd=cwd, folder=folder, fault=PHASES[case.phase]) as run:
        run.wait_for_fault(case.phase)
        run.wait_until(lambda: len(run.ranks()) == 2, "two ranks")
        time.sleep(0.2)
        send(run.targets()[case.target], case.signal)
        seconds = run.end()
        ended, text, events = run.ended(), run.text, run.events()
    wrong = []
    if ended["code"] not in case.codes or ended["step"] != case.step:
        wrong.append(f"exit.json says {ended}")
    if ("before training" in ended["reason"]) != (case.step is None):
        wrong.append(f"it ended {ended['reason']!r}, at another time than asked")
    if events.count("saved") != (case.step is not None):
        wrong.append(f"saved {events.count('saved')} times")
    if "/ds_trainer/" in text and 'File "' in text.partition("/ds_trainer/")[0].splitlines()[-1]:
        wrong.append("a traceback of ours on the terminal")
    last = [line for line in text.splitlines() if line.startswith("ds_trainer: ")]
    if len(last) != 1:
        wrong.append(f"{len(last)} last words")
    return {"seconds": round(seconds, 2), "code": ended["code"], "step": ended["step"], "wrong": wrong, "text": text}
