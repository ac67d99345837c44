"""The stories of `verify`: are a run's checkpoints whole, and does a run that is killed and resumed compute the same."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ds_trainer.arguments.merge import Resolved
from ds_trainer.checkpoint import layout
from ds_trainer.errors import CheckpointError, RefusedError, TrainingError

Report = Callable[[str], None]

POLL_SECONDS = 0.2
MARK = "DS_TRAINER_VERIFY"
"""A variable that tells the processes of one start of the proof from all others."""


def verify_run(run: Path, report: Report) -> None:
    """Read every byte of every checkpoint of a run, compare it with its manifest, and say which a start would take.

    Args:
        run: the run folder.
        report: takes a line for the user.

    Raises:
        RefusedError: there is no checkpoint.
        CheckpointError: a checkpoint is damaged.
    """
    folder = run / "checkpoints"
    checkpoints = layout.complete_checkpoints(folder)
    if not checkpoints:
        raise RefusedError(
            f"{run}: holds no complete checkpoint ({folder.absolute()}). Name the folder that checkpoint.folder of a run says."
        )
    damaged: list[str] = []
    newest = None
    for path in checkpoints:
        started = time.monotonic()
        try:
            manifest = layout.read_manifest(path)
            why = _damage(path, manifest["files"])
        except ValueError as error:
            why, manifest = str(error), {}
        if why is None:
            newest = path
            num_bytes, seconds = sum(each["bytes"] for each in manifest["files"].values()), time.monotonic() - started
            loss = f", held-out {judged['metric']} {judged['value']:.4f}" if (judged := layout.judged_of(manifest)) else ""
            ranks = manifest["layout"]["ranks"]
            report(
                f"{path.name}  whole    {layout.in_words(num_bytes)} of {ranks} {'rank' if ranks == 1 else 'ranks'} "
                f"in {seconds:.1f} s, ZeRO-{manifest['layout']['zero_stage']}{loss}"
            )
        else:
            damaged.append(path.name)
            report(f"{path.name}  DAMAGED  it {why}")
    for path in layout.leftovers(folder):
        report(f"{path.name}  left behind by a killed save; the next start removes it")
    report(f"a start would take {newest.name}" if newest else "a start would refuse to go on: none of them is whole")
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(checkpoints)} checkpoints of {run} are damaged: {', '.join(damaged)}.")


def _damage(path: Path, files: dict[str, Any]) -> str | None:
    """What is wrong with the files of a checkpoint; several are read at a time."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
        found = readers.map(lambda name: layout.damage(path, [name], files), sorted(files))
        return next((each for each in found if each is not None), None)


def verify_resume(resolved: Resolved, launch: str, *, arguments: list[str], steps: int, timeout: float, report: Report) -> None:
    """Train, save in the middle, kill, resume, and compare every step that was done twice, bit for bit.

    The proof runs in a folder `verify` inside the run folder, which is removed when it succeeds.

    Args:
        resolved: the settings in force.
        launch: the launcher and its options, up to where the module's name stands.
        arguments: what names the settings on the command line: `--config run.yaml --set train.seed=1`.
        steps: optimizer steps before the checkpoint, and again after it.
        timeout: seconds that each of the two starts may take.
        report: takes a line for the user.

    Raises:
        RefusedError: the run is shorter than the proof.
        TrainingError: a start did not come as far, or the resumed run computed something else.
    """
    from ds_trainer.run_data import cache_folder_of

    settings = resolved.settings
    folder = Path(settings.checkpoint.folder) / "verify"
    max_steps = settings.train.max_steps
    if max_steps is not None and max_steps <= 2 * steps:
        raise RefusedError(
            f"--steps {steps}: the proof needs {2 * steps + 1} optimizer steps and train.max_steps = {max_steps}. "
            f"Write --steps {max(1, (max_steps - 1) // 2)}."
        )
    shutil.rmtree(folder, ignore_errors=True)
    (folder.parent / "verify.log").unlink(missing_ok=True)
    ours = [
        f"checkpoint.folder={folder}",
        f"data.cache_folder={cache_folder_of(settings)}",  # the run's own, so that nothing is tokenised twice
        f"checkpoint.every_steps={steps}",
        "checkpoint.keep_last=9",
        "monitor.log_every_steps=1",
        "train.deterministic=true",  # on a GPU two equal runs differ in their last bits otherwise
        *([f"evaluate.every_steps={steps}"] if settings.checkpoint.keep_best else []),  # where it saves
        "checkpoint.resume=auto",
    ]
    last = [word for each in ours for word in ("--set", each)]  # what stands in `arguments` must not overrule them
    command = [*shlex.split(launch), "ds_trainer", "train", *arguments, *last]
    report(f"starting: {shlex.join(command)}")
    _train_and_kill(command, folder, until=2 * steps, lines_before=0, timeout=timeout, report=report)
    whole = _logged(folder)
    kept = layout.checkpoint_name(steps)
    if not (folder / "checkpoints" / kept).is_dir():
        raise TrainingError(f"{folder / 'checkpoints' / kept} was not written: the log is in {folder / 'logs'}.")
    for path in layout.complete_checkpoints(folder / "checkpoints"):
        if path.name != kept:
            shutil.rmtree(path)
    report(f"killed after step {whole[-1]['step']}; starting the same command again, from {kept}")
    _train_and_kill(command, folder, until=2 * steps, lines_before=len(whole), timeout=timeout, report=report)
    compare(whole, _logged(folder)[len(whole) :], first=steps + 1, last=2 * steps)
    shutil.rmtree(folder)
    (folder.parent / "verify.log").unlink()
    report(
        f"PROVED: a run that was killed and resumed from step {steps} computed loss and gradient norm of steps {steps + 1} to "
        f"{2 * steps} again, bit for bit"
    )


def compare(whole: list[dict[str, Any]], again: list[dict[str, Any]], *, first: int, last: int) -> None:
    """Compare what two starts logged of the same steps.

    Raises:
        TrainingError: they differ, with the step and both values.
    """
    theirs = {line["step"]: line for line in whole}
    ours = {line["step"]: line for line in again}
    if missing := [step for step in range(first, last + 1) if step not in ours]:
        raise TrainingError(f"the resumed run did not do step {missing[0]} again: it went on from somewhere else.")
    for step in range(first, last + 1):
        for name in ("loss", "grad_norm"):
            if ours[step][name] != theirs[step][name]:
                was, now = theirs[step][name], ours[step][name]
                raise TrainingError(
                    f"the resumed run is another one: {name} of step {step} was {was!r} and is {now!r}. A resume is not exact "
                    "here; what both starts logged is kept in the folder `verify` of the run folder."
                )


def _train_and_kill(command: list[str], folder: Path, *, until: int, lines_before: int, timeout: float, report: Report) -> None:
    """Start a training, and kill it with everything it started as soon as it has logged a step."""
    with _session(command, folder.parent / "verify.log") as process:
        deadline = time.monotonic() + timeout
        told = 0
        while True:
            lines = _logged(folder)[lines_before:]
            for line in lines[told:]:
                report(f"  step {line['step']}: loss {line['loss']:.6f}")
            told = len(lines)
            if lines and lines[-1]["step"] >= until:
                return
            if process.poll() is not None:
                raise TrainingError(f"the training ended before step {until}: {_last_words(folder)}")
            if time.monotonic() > deadline:
                raise TrainingError(f"the training did not reach step {until} within {timeout:.0f} s. Give it more: --timeout.")
            time.sleep(POLL_SECONDS)


def _last_words(folder: Path) -> str:
    """Why a start ended, from its exit.json, and where the rest stands."""
    reason = "it left no exit.json."
    with contextlib.suppress(OSError, ValueError):
        reason = json.loads((folder / "exit.json").read_text(encoding="utf-8"))["reason"]
    return f"{reason}\nWhat it printed is in {folder.parent / 'verify.log'}."


@contextlib.contextmanager
def _session(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command; at the end it and all that it started on this host is killed, without a chance to tidy up."""
    mark = f"{MARK}={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("a") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, name: value},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
    except OSError as error:
        raise RefusedError(f"--launch: {command[0]} cannot be started ({error.strerror}).") from None
    try:
        yield process
    finally:
        # Not by session: torchrun gives each rank one of its own.
        while found := _marked(mark):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.poll()
            time.sleep(POLL_SECONDS)
        process.wait()


def _marked(mark: str) -> list[int]:
    """The living processes of this host that have a variable in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


def _logged(folder: Path) -> list[dict[str, Any]]:
    """The training steps in metrics.jsonl."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    complete = text[: text.rfind("\n") + 1]
    return [fields for line in complete.splitlines() if "loss" in (fields := json.loads(line))]
