"""What a run folder tells of the start that failed: its step, ranks and settings, and the checkpoint before it.

Everything is read from the folder itself: the run file and the JSON it was started with may have changed since.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_trainer.arguments.deepspeed_keys import SHARED
from ds_trainer.checkpoint.layout import complete_checkpoints
from ds_trainer.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_PREEMPTED, DataError, RefusedError

SETTINGS = "replayed.yaml"
"""In the folder of the debug run: the settings of the run, as a run file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crash:
    """The last start of a run, which failed in a step."""

    run: Path
    reason: str
    """What `exit.json` says, its first line."""
    step: int
    """That was worked on when it failed, from 1."""
    world_size: int
    """Ranks of that start."""
    micro_batches: dict[int, list[int]]
    """Rank -> its micro-batches, from 0, whose loss was not finite; empty where that was not the reason."""
    checkpoint: Path | None
    """The newest one before the step; None when the run began from nothing and had not saved."""
    fingerprint: str | None
    """Of the data; None where a version before this one wrote the folder."""


def read_crash(run: Path, step: int | None) -> Crash:
    """Read how the last start of a run ended.

    Args:
        run: the run folder.
        step: what `--step` says, where the folder cannot tell.

    Raises:
        RefusedError: it is no run folder, the run did not fail in a step, or the checkpoint before the step is gone.
    """
    if not (run / "events.jsonl").is_file() or not (run / "resolved.json").is_file():
        raise RefusedError(
            f"--replay {run}: is no run folder, for it has no events.jsonl and resolved.json. Name the folder that "
            "checkpoint.folder of the run file says."
        )
    events = read_events(run / "events.jsonl")
    starts = [index for index, event in enumerate(events) if event["event"] == "started"]
    if not starts:
        raise RefusedError(f"--replay {run}: no start of this run got as far as its first step, so there is nothing to replay.")
    last = events[starts[-1] :]
    ended = next((event for event in last if event["event"] == "ended"), None)
    reason, failed_at = how_it_ended(run, ended, step)
    skipped = [event for event in last if event["event"] == "skipped" and event["step"] == failed_at]
    return Crash(
        run=run,
        reason=reason,
        step=failed_at,
        world_size=last[0]["world_size"],
        micro_batches={int(rank): [each - 1 for each in micro] for rank, micro in skipped[-1]["micro_batches"].items()}
        if skipped
        else {},
        checkpoint=checkpoint_before(run, failed_at, events),
        fingerprint=last[0].get("data"),
    )


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of an events.jsonl; one that a kill cut short is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def how_it_ended(run: Path, ended: dict[str, Any] | None, step: int | None) -> tuple[str, int]:
    """The reason of a failure, and the step it failed at.

    Args:
        run: the run folder.
        ended: its last start's event of that name; None when there is none.
        step: what `--step` says.

    Raises:
        RefusedError: it did not fail in a step.
    """
    if ended is None:
        if step is None:
            logged = [line["step"] for line in read_events(run / "metrics.jsonl")] if (run / "metrics.jsonl").is_file() else []
            raise RefusedError(
                f"--replay {run}: its last start left no account of its end: it still runs, or was killed without a word. Say "
                f"which step to replay: --step {max(logged, default=0) + 1} is the first one after the last that was logged."
            )
        return "no word: it still runs, or was killed", step
    code, reason = ended["code"], ended["reason"].split("\n")[0]
    if code in (EXIT_DONE, EXIT_PREEMPTED) or code > 128:
        raise RefusedError(f"--replay {run}: the run did not fail ({reason}). There is nothing to replay.")
    if code == EXIT_CHECKPOINT:
        raise RefusedError(f"--replay {run}: not a step failed but a checkpoint ({reason}). There is nothing to replay.")
    failed_at = step or ended.get("at_step")
    if failed_at is None:
        raise RefusedError(
            f"--replay {run}: the run failed before its first step ({reason}), so there is nothing to replay."
            if "at_step" in ended
            else f"--replay {run}: was written by a version that does not say at which step it failed ({reason}). Add --step."
        )
    return reason, int(failed_at)


def checkpoint_before(run: Path, step: int, events: list[dict[str, Any]]) -> Path | None:
    """The newest checkpoint before a step; None when the run began from nothing and there was none.

    Raises:
        RefusedError: there was one, and it is gone.
    """
    there = complete_checkpoints(run / "checkpoints")
    before = [path for path in there if int(path.name.removeprefix("step_")) < step]
    if before:
        return before[-1]
    begun = max((index for index, event in enumerate(events) if event["event"] == "started_anew"), default=0)
    saved = [event["step"] for event in events[begun:] if event["event"] in ("saved", "resumed") and event["step"] < step]
    if saved:
        raise RefusedError(
            f"--replay {run}: to replay step {step}, a checkpoint of an earlier step is needed. The run had one of step "
            f"{max(saved)}, and it is gone (there is {', '.join(path.name for path in there) or 'none'}). Restore it, or begin "
            f"with other weights: ds_trainer debug --config {run / 'run.yaml'} --step {step}."
        )
    return None


def write_settings(run: Path) -> Path:
    """The settings that were in force, as a run file in the folder of the debug run. Returns its path.

    `resolved.json` has every setting, whichever of run file, JSON and command line said it; a default is no statement. What
    DeepSpeed calls by another name is left out of its section: what was overruled may still stand there.
    """
    import yaml

    resolved = json.loads((run / "resolved.json").read_text(encoding="utf-8"))
    shared = [*(each.key for each in SHARED), "bf16.enabled", "bfloat16.enabled", "fp16.enabled", "config"]
    left_out = tuple(f"deepspeed.{each}." for each in shared)
    tree: dict[str, Any] = {}
    for path, fields in resolved.items():
        key = f"{path}."
        if fields["origin"] == "default" or key.startswith(left_out):
            continue
        *blocks, name = path.split(".")
        block = tree
        for each in blocks:
            block = block.setdefault(each, {})
        block[name] = fields["value"]
    tree["checkpoint"]["folder"] = str(run)
    target = run / "debug" / SETTINGS
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise RefusedError(f"--replay {run}: {target} cannot be written ({error.strerror}). Copy the run folder.") from None
    return target


def to_its_folder(run: Path, report: Callable[[str], None]) -> None:
    """Change to the folder the run was started in: its settings may name files relative to it."""
    environment = run / "environment.json"
    folder = json.loads(environment.read_text(encoding="utf-8")).get("folder") if environment.is_file() else None
    if folder and Path(folder) != Path.cwd():
        if Path(folder).is_dir():
            os.chdir(folder)
        report(f"relative paths are from {Path.cwd()}" + ("" if Path(folder).is_dir() else f"; {folder} is not here"))


def require_same_data(crash: Crash, fingerprint: str) -> None:
    """Refuse to replay with other data.

    Raises:
        DataError: the data is not what the run was fed.
    """
    if crash.fingerprint not in (None, fingerprint):
        raise DataError(
            f"--replay {crash.run}: the data has changed since the run (fingerprint {fingerprint}, then {crash.fingerprint}). "
            "Restore the files and the tokenizer the run read."
        )
