"""How a start ends: its output goes to the run folder, and exit code, reason and the command to continue are left there."""

from __future__ import annotations

import atexit
import dataclasses
import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from ds_trainer.arguments.merge import Resolved
from ds_trainer.checkpoint.layout import complete_checkpoints, newest_step
from ds_trainer.errors import (
    EXIT_BY_SIGNAL,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    DsTrainerError,
    HangError,
    RefusedError,
    ResumeError,
    TrainingError,
)
from ds_trainer.launch.commands import Commands
from ds_trainer.launch.detect import Launch
from ds_trainer.monitor import logs
from ds_trainer.monitor.parents import Parents
from ds_trainer.monitor.progress import Progress
from ds_trainer.monitor.run_folder import RunFolder
from ds_trainer.monitor.signals import LAUNCHER_GONE, RANK_GONE, TIME_IS_UP, StopRequests, in_words

_LOST_PEER = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")
"""What gloo and NCCL say when a process at the other end is gone."""

_LEFT_ALONE = (
    "lost the connection to another rank, which ended without a word. Was it killed, for want of memory perhaps? "
    "`dmesg` on its host and the launcher's lines tell."
)

_ending = threading.Lock()


_NOT_DETERMINISTIC = (
    "train.deterministic allows no such operation: leave the setting out. (`verify --resume` sets it, since without it a GPU "
    "computes other last bits each time: with this operation a resume cannot be proved there.)"
)


def run_in_folder(
    resolved: Resolved,
    launch: Launch,
    commands: Commands,
    story: Callable[[RunFolder, Console, StopRequests, Callable[[BaseException], NoReturn]], tuple[str, int]],
    *,
    begun: float,
) -> NoReturn:
    """Run a story with its output in the run folder, and account there for how it ended.

    Args:
        resolved: the settings in force.
        launch: this process's place in the job.
        commands: what the user typed, for the command that goes on.
        story: given the run folder, the terminal, the requests to stop, and what accounts for an error in any thread and ends
            the process; returns its last word, and why it stopped, or 0.
        begun: when this process began, by the monotonic clock, in seconds; `train.max_seconds` counts from there.
    """
    parents = Parents.now()
    folder = RunFolder(Path(resolved.settings.checkpoint.folder), launch.rank)
    folder.create()
    _check_resume(resolved, folder)
    console = logs.terminal()
    if launch.rank == 0:
        folder.lock()
        folder.forget_last_end()
    logs.to_log_file(folder.log)
    command = continue_command(resolved, launch, commands, parents.command())

    def end_with(error: BaseException) -> NoReturn:
        _account_for(error, folder, launch, console, command)

    code: int | None = None
    """What this process leaves with; None while it works."""

    def end_at_once(reason: int) -> None:
        if code is not None:  # all is said; what still hangs is a tracker that sends the last of what it holds
            os._exit(_for_launcher(code, launch))
        if reason == RANK_GONE:
            end_with(TrainingError(_LEFT_ALONE))
        stopped = Stopped(reason, nothing_lost=not requests.training)
        if launch.rank and not _ranks_have_met():
            # The folder may be another start's, and rank zero refused for that: nothing is written into it.
            os._exit(_for_launcher(stopped.exit_code, launch))
        end_with(stopped)

    limit = resolved.settings.train.max_seconds
    requests = StopRequests(
        end=end_at_once,
        say=Progress(console if launch.rank == 0 else None).say,
        a_rank_failed=folder.first_failure.exists,
        parents=parents,
        deadline=begun + limit if limit and launch.rank == 0 else None,
    )
    requests.watch()
    try:
        last_word, stopped = story(folder, console, requests, end_with)
    except BaseException as error:
        end_with(error)
    _ending.acquire()
    ending = EXIT_PREEMPTED if stopped else EXIT_DONE
    if launch.rank == 0:
        step = newest_step(folder.checkpoints)
        reason = _why_stopped(stopped, limit) if stopped else "done"
        folder.finish(ending, reason, step=step, command=command)
        console.print(f"ds_trainer: {reason}. {_onwards(step)} with: {command}" if stopped else last_word, markup=False)
    code = ending
    _leave(_for_launcher(code, launch))


def _why_stopped(reason: int, limit: int | None) -> str:
    """Why a run ended before its time, all ranks together."""
    return f"train.max_seconds = {limit} is over" if reason == TIME_IS_UP else f"stopped by {in_words(reason)}"


def _onwards(step: int | None) -> str:
    return f"The run goes on from step {step}" if step else "There is no checkpoint yet: the run starts anew"


def _ranks_have_met() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def _check_resume(resolved: Resolved, folder: RunFolder) -> None:
    """Refuse a checkpoint that is not there before anything is built."""
    resume = resolved.settings.checkpoint.resume
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        there = [str(path) for path in complete_checkpoints(folder.checkpoints)]
        raise ResumeError(
            f"checkpoint.resume = {resume}: write auto, never or the folder of a checkpoint. "
            + (f"This run has {', '.join(there)}." if there else f"{folder.checkpoints} holds none.")
        )


class Stopped(BaseException):
    """This process is asked to end at once."""

    def __init__(self, reason: int, *, nothing_lost: bool) -> None:
        """Take the reason.

        Args:
            reason: a signal's number, or one of `monitor.signals`.
            nothing_lost: no step was being worked on; a start by a scheduler may simply be repeated.
        """
        super().__init__(f"stopped by {in_words(reason)}" + (" before training" if nothing_lost else ", at once"))
        number = signal.SIGTERM if reason == LAUNCHER_GONE else reason
        again = nothing_lost and number != signal.SIGINT  # who presses Ctrl-C wants no requeue
        self.exit_code = EXIT_PREEMPTED if again else EXIT_BY_SIGNAL + number


def continue_command(resolved: Resolved, launch: Launch, commands: Commands, launcher: list[str]) -> str:
    """What goes on where this start ends: the same command, without a `--resume` that would go back.

    Args:
        resolved: the settings in force.
        launch: this process's place in the job.
        commands: what the user typed after the module.
        launcher: the command line of the launcher, in words; empty where it runs on another host.
    """
    arguments = list(commands.arguments)
    for index in reversed([index for index, each in enumerate(arguments) if re.match(r"--resume(=|$)", each)]):
        del arguments[index : index + (1 if "=" in arguments[index] else 2)]
    if resolved.settings.checkpoint.resume != "auto":
        arguments += ["--resume", "auto"]
    commands = dataclasses.replace(commands, arguments=tuple(arguments), device_count=launch.local_world_size)
    if typed := commands.again(launcher):
        return typed
    if launch.launcher == "deepspeed":
        return commands.deepspeed_hosts() if launch.node_count > 1 else commands.deepspeed()
    return commands.torchrun()


def _account_for(error: BaseException, folder: RunFolder, launch: Launch, console: Console, command: str) -> NoReturn:
    """Name the first failing rank and the cause in one block, and leave at once: the other ranks may wait for ever."""
    _ending.acquire()  # until the end: a signal that comes now must not cut the last words short
    code = getattr(error, "exit_code", EXIT_OUT_OF_MEMORY if isinstance(error, MemoryError) else EXIT_FAILED)
    text = _in_words(error)
    if folder.record_error(error):
        step = newest_step(folder.checkpoints)
        for line in _last_words(error, text, folder, launch, step, command):
            console.print(line, markup=False)
        # What was refused would be refused again.
        folder.finish(code, text, step=step, command=None if isinstance(error, RefusedError) else command)
    console.show_cursor()  # a progress bar hides it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_for_launcher(code, launch))


def _for_launcher(code: int, launch: Launch) -> int:
    """The code to leave with: a launcher that restarts what fails must not restart what was asked to stop."""
    return EXIT_DONE if code == EXIT_PREEMPTED and launch.restarts else code


def _leave(code: int) -> NoReturn:
    """End a process whose work is done, without taking torch's threads apart.

    The interpreter's own end does that, and now and then aborts in it (SIGABRT, "terminate called without an active exception";
    seen with torch 2.13 and gloo in 2 of 12 runs): a complete run would end with an error.
    """
    atexit._run_exitfuncs()  # trackers send the last of what they hold there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _last_words(
    error: BaseException, text: str, folder: RunFolder, launch: Launch, step: int | None, command: str
) -> list[str]:
    """What the terminal says at the end of a start that failed."""
    who = f"rank {launch.rank} of {launch.world_size} on {socket.gethostname()}"
    if isinstance(error, RefusedError):
        return [f"ds_trainer: {text}", *([f"({who})"] if launch.node_count > 1 else [])]
    if isinstance(error, Stopped):
        return [f"ds_trainer: {text}. {_onwards(step)} with: {command}"]
    # The rank that speaks when another one vanished is not the one that failed.
    how = "was left alone" if text.startswith(_LEFT_ALONE) else "failed first"
    traces = f"Traceback: {folder.error}"
    if isinstance(error, HangError):
        how, traces = "found that the run hangs", f"Stacks of the ranks: {folder.error.parent}"
    return [
        f"\nds_trainer: {who} {how}:",
        *(f"  {line}" for line in text.splitlines()),
        traces,
        f"Log: {folder.log}",
        f"{_onwards(step)}, when the cause is mended, with",
        f"  {command}",
    ]


def _in_words(error: BaseException) -> str:
    """What happened, for somebody who does not read tracebacks."""
    if isinstance(error, DsTrainerError | Stopped):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {str(error)[:500]}"
    if isinstance(error, RuntimeError) and _LOST_PEER.search(text):
        return f"{_LEFT_ALONE}\n({text.splitlines()[0]})"
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in text:
        return f"{text.partition(', but you set')[0]}. {_NOT_DETERMINISTIC}"
    return f"{text}\n({frame.filename}:{frame.lineno}, in {frame.name})"
