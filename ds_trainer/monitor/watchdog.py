"""Notice that this rank stands still, write down where, and name the rank that all others wait for.

A thread of each rank looks at `whereabouts.now`. It uses no network: ranks that hang cannot agree on anything, so each writes a
file of its own, and one of them reads the others'. A main thread that holds the interpreter's lock stops this thread too; then
faulthandler's timer, which needs no lock, writes the stacks into the rank's log and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ds_trainer import whereabouts
from ds_trainer.errors import HangError
from ds_trainer.monitor.metrics import as_ranges
from ds_trainer.monitor.run_folder import RunFolder, now

MARKER = "hang.txt"
"""In `errors`: a rank has noticed, and the others write down where they are too."""
ANSWER_SECONDS = 5.0
"""Time the other ranks have to notice the marker and to answer, besides a twentieth of the limit."""
TIMER_SECONDS = 10.0
"""How long after that faulthandler's timer ends a process whose watchdog cannot run: when the others have left with the better
account, and before the launcher kills it, as torchrun does after 30 s.
"""
_BEGINS = "no progress for "
_ROWS = 8
_PACKAGE = Path(__file__).parents[1]
_DISTRIBUTED = ("/torch/distributed/", "/deepspeed/comm/")
_WRAPPER = "/deepspeed/utils/nvtx.py"
"""Stands between any two frames of DeepSpeed."""
_NO_ANSWER = "did not answer: stopped, dead, or holding the interpreter's lock (then its stacks follow in its log)"

Frames = list[tuple[str, int, str]]
"""File, line and function, the innermost first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Where a rank stands."""

    rank: int
    step: int | None
    phase: str
    seconds: float
    """Since it was last seen moving."""
    marks: int
    """See `whereabouts.Place`."""
    ours: str
    """The innermost frame of this package in the main thread."""
    innermost: str
    """The innermost frame of all."""
    waits_in: str | None
    """The collective the main thread is in, or None when it is in none."""


class Watchdog:
    """Ends the process when its main thread makes no progress; a context manager around what is watched."""

    def __init__(
        self,
        folder: RunFolder,
        hosts: Sequence[str],
        *,
        timeout_seconds: float,
        start_seconds: float,
        end: Callable[[BaseException], Any],
    ) -> None:
        """Nothing starts before the context is entered.

        Args:
            folder: the run folder; all ranks see it.
            hosts: of all ranks, by rank.
            timeout_seconds: without progress for so long, the rank ends.
            start_seconds: the same before the first step, where loading a model is one piece of work.
            end: called with a HangError in the watchdog's thread; accounts for it and ends the process.
        """
        self._folder, self._hosts, self._end = folder, hosts, end
        self._timeout, self._start = timeout_seconds, start_seconds
        self._tick = min(1.0, timeout_seconds / 20)
        self._answer_seconds = ANSWER_SECONDS + timeout_seconds / 20
        self._stop = threading.Event()
        self._marker = folder.error.parent / MARKER

    def __enter__(self) -> Watchdog:
        whereabouts.at(whereabouts.now.phase)  # what was before is not counted
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        armed, every = 0.0, self._timeout / 100
        while not self._stop.wait(self._tick):
            begun, place = time.monotonic(), whereabouts.now
            limit = self._start if place.step is None else self._timeout
            if begun - armed >= every:
                armed = begun
                # Into the descriptor of the log: nothing can be opened without the interpreter's lock.
                faulthandler.dump_traceback_later(limit + every + self._answer_seconds + TIMER_SECONDS, exit=True, file=2)
            idle = begun - place.since
            # A rank that moved a moment ago asks nobody: in a healthy run this costs nothing.
            if idle >= limit or (idle >= self._timeout / 20 and self._marker.exists()):
                self._report(idle, limit)

    def _report(self, idle: float, limit: float) -> None:
        """Write down where this rank is, wait for the others, and end."""
        write_answer(self._folder.error, answer_of(self._folder.rank, idle))
        self._marker.touch()
        until = time.monotonic() + self._answer_seconds
        while len(answers := read_answers(self._marker.parent)) < len(self._hosts) and time.monotonic() < until:
            time.sleep(self._tick)
        spoken = self._marker.with_name("first_failure.txt")
        until = time.monotonic() + ANSWER_SECONDS
        # The lowest rank speaks first; if it cannot, another one does.
        while self._folder.rank > min(answers) and not spoken.exists() and time.monotonic() < until:
            time.sleep(self._tick)
        self._end(HangError("\n".join(explain(answers, self._hosts, limit))))


def answer_of(rank: int, idle: float) -> Answer:
    """Where this process stands now.

    Args:
        rank: of this process.
        idle: seconds without progress.
    """
    place = whereabouts.now
    stacks = {identity: _frames(frame) for identity, frame in sys._current_frames().items()}
    main = stacks[threading.main_thread().ident or 0]
    ours = next((_short(frame) for frame in main if frame[0].startswith(f"{_PACKAGE}{os.sep}")), "")
    waits_in = _collective(main)
    if waits_in is None and any(name == "_engine_run_backward" for _, _, name in main):
        # On a GPU, gradients are reduced by autograd's own threads, which Python did not start.
        started = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
        others = (_collective(stack) for identity, stack in stacks.items() if identity not in started)
        waits_in = next((each for each in others if each), None)
    return Answer(
        rank=rank,
        step=place.step,
        phase=place.phase,
        seconds=round(idle, 1),
        marks=place.marks,
        ours=ours,
        innermost=_short(main[0]),
        waits_in=waits_in,
    )


def write_answer(path: Path, answer: Answer) -> None:
    """Write an answer and the stacks of all threads; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(
            f"{now()} on {socket.gethostname()}\nno progress for {answer.seconds:.0f} s\n{json.dumps(asdict(answer))}\n\n"
        )
        file.flush()
        faulthandler.dump_traceback(file)
    temporary.replace(path)


def read_answers(folder: Path) -> dict[int, Answer]:
    """The answers of all ranks so far, by rank; files of other errors are passed over."""
    found = {}
    for path in sorted(folder.glob("rank_*.txt")):
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = [file.readline() for _ in range(3)]
        if lines[1].startswith(_BEGINS):
            answer = Answer(**json.loads(lines[2]))
            found[answer.rank] = answer
    return found


def waited_for(answers: Mapping[int, Answer], world_size: int) -> list[int]:
    """The ranks that the others wait for, as far as that can be told; empty when it cannot. Pure."""
    if silent := [rank for rank in range(world_size) if rank not in answers]:
        return silent
    elsewhere = [rank for rank, answer in answers.items() if answer.waits_in is None]
    # All in a collective, or none: on a GPU, a rank waits for one where it next reads a number.
    candidates = elsewhere or list(answers)
    least = min(answers[rank].marks for rank in candidates)
    behind = [rank for rank in candidates if answers[rank].marks == least]
    return behind if len(behind) < len(answers) else []


def explain(answers: Mapping[int, Answer], hosts: Sequence[str], limit_seconds: float) -> list[str]:
    """What is known of a hang: a table by rank, and the ranks that the others wait for. Pure.

    Args:
        answers: by rank, of those that answered.
        hosts: of all ranks, by rank.
        limit_seconds: the limit that was passed.
    """
    world_size = len(hosts)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for rank in range(world_size):
        answer = answers.get(rank)
        if answer is None:
            groups.setdefault(("", "", _NO_ANSWER), []).append(rank)
            continue
        where = f"in {answer.waits_in}, " if answer.waits_in else ""
        where += answer.innermost + (f", from {answer.ours}" if answer.ours not in ("", answer.innermost) else "")
        step = "" if answer.step is None else str(answer.step)
        groups.setdefault((step, answer.phase, where), []).append(rank)
    rows = [("rank", "step", "phase", "where")]
    rows += [
        (as_ranges(ranks), *cells) for cells, ranks in sorted(groups.items(), key=lambda each: (len(each[1]), each[1]))[:_ROWS]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{_BEGINS}{limit_seconds:g} s."]
    for row in rows:
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    if len(groups) > _ROWS:
        lines.append(f"and {len(groups) - _ROWS} more places: see errors/")
    blamed = waited_for(answers, world_size)
    if world_size > 1 and blamed:
        there = list(dict.fromkeys(hosts[rank] for rank in blamed))
        lines.append(f"The others wait for rank {as_ranges(blamed)} on {', '.join(there[:_ROWS])}.")
    elif world_size > 1:
        lines.append("All ranks stand at the same place: look at the network between them, and at errors/ for their stacks.")
    setting = "collective" if all(each.step is None for each in answers.values()) else "hang"
    lines.append(f"If that was only slow, raise train.{setting}_timeout_seconds.")
    return lines


def _frames(frame: FrameType | None) -> Frames:
    found: Frames = []
    while frame is not None:
        if not frame.f_code.co_filename.endswith(_WRAPPER):
            found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def _collective(frames: Frames) -> str | None:
    """The collective a stack is in: a call into torch.distributed, or DeepSpeed's wait for one it has begun."""
    file, _, name = frames[0]
    if name in ("wait", "synchronize") and "/deepspeed/" in file:
        return name
    return next((name for file, _, name in frames if any(part in file for part in _DISTRIBUTED)), None)


def _short(frame: tuple[str, int, str]) -> str:
    file, line, name = frame
    for root in ("/site-packages/", f"{_PACKAGE.parent}{os.sep}"):
        file = file.rpartition(root)[2]
    return f"{file}:{line} {name}"
