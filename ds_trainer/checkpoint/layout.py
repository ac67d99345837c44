"""What a checkpoint looks like on disk, and whether it is complete.

    checkpoints/
      latest                      name of the newest complete checkpoint
      best                        name of the best one by evaluate.metric, where any was evaluated
      step_00000100/              complete: only a finished one ever gets this name
        manifest.json             state of the run, and size and hash of every other file
        rank_00000.safetensors    what each rank held of weights and optimizer states
      .partial-step_00000200/     being written, or left by a killed run: never read
      aside_1_step_00000300/      beyond the step a later start went on from: damaged or abandoned, never read

Source of the protocol: docs/design/checkpoints.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from ds_trainer import faults

MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
PARTIAL = ".partial-"
REMOVED = ".removed-"
FORMAT = 3
"""Version of the manifest; a later program reads older ones or refuses them by this number. Format 2 had SHA-256 for XXH3."""
HASH = "xxh3_128"
"""What the content of files is known again by. It has to find what a disk or a copy damaged, not to withstand an attacker, who
would write a new manifest as well: so it may be one that runs at the speed of memory. Source: https://xxhash.com"""
HASHES: dict[str, Callable[[], Any]] = {HASH: xxhash.xxh3_128, "sha256": hashlib.sha256}

_OWN_HASH = "sha256_of_the_rest"
_NAME = re.compile(r"step_(\d{8,})")


def in_words(num_bytes: int) -> str:
    """A size on the disk, such as "3.52 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that carry a finished one's name, oldest first; their files are not looked at."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint in a folder; None when there is none."""
    names = [path.name for path in complete_checkpoints(folder)]
    return int(names[-1].removeprefix("step_")) if names else None


def leftovers(folder: Path) -> list[Path]:
    """What a killed save or a killed removal left behind."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.startswith((PARTIAL, REMOVED)))


def write_manifest(checkpoint: Path, fields: dict[str, Any]) -> None:
    """Write the manifest, with a hash of itself, and everything above it through to the disk."""
    path = checkpoint / MANIFEST
    fields = json.loads(json.dumps(fields))  # as a reader will have them, so that the hash is of the same
    with path.open("w", encoding="utf-8") as file:
        json.dump({**fields, _OWN_HASH: _hash_of(fields)}, file, indent=1)
        file.flush()
        faults.point("save_manifest_written")
        os.fsync(file.fileno())
    fsync_folder(checkpoint)


def _hash_of(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_name(folder: Path, file_name: str, name: str) -> None:
    """Name a checkpoint in `latest` or `best`, for people and other programs; this one never relies on it."""
    temporary = folder / f".{file_name}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(name)
        file.flush()
        os.fsync(file.fileno())
    faults.point("save_before_latest")
    temporary.replace(folder / file_name)
    fsync_folder(folder)


def judged_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """How good a checkpoint was found on held-out data: `metric`, `goal` and `value`; None where nothing was evaluated."""
    if "judged" in manifest:
        judged: dict[str, Any] | None = manifest["judged"]
        return judged
    loss = manifest.get("held_out_loss")  # as it was written before there was a choice
    return None if loss is None else {"metric": "loss", "goal": "lowest", "value": loss}


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest's fields.

    Raises:
        ValueError: it is missing, unreadable or of an unknown format; the text says which.
    """
    try:
        fields = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("has no manifest.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"its manifest.json cannot be read ({error})") from None
    if not isinstance(fields, dict) or fields.get("format") not in (2, FORMAT):
        raise ValueError(f"its manifest.json is not of format 2 or {FORMAT}, which this version reads")
    if fields.pop(_OWN_HASH, None) != _hash_of(fields):
        raise ValueError("its manifest.json does not have the content that was written")
    return fields


def damage(checkpoint: Path, files: Iterable[str], expected: dict[str, Any]) -> str | None:
    """What is wrong with some files of a checkpoint, or None.

    Args:
        checkpoint: the checkpoint's folder.
        files: names below it, a part of `expected`'s.
        expected: size and hash by name, from the manifest.
    """
    for name in files:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected[name]["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected[name]['bytes']}"
        (kind,) = expected[name].keys() & HASHES
        with path.open("rb") as file:
            found = hashlib.file_digest(file, HASHES[kind]).hexdigest()
        if found != expected[name][kind]:
            return f"{name} does not have the content that was written"
    return None


def fsync_folder(path: Path) -> None:
    """Write a folder's entries through to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
