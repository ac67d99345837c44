"""A checkpoint is complete or it does not exist; what is damaged is passed over with a reason."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import xxhash

from ds_trainer import faults
from ds_trainer.checkpoint import layout, manager, saver
from ds_trainer.checkpoint.keep import Keep
from ds_trainer.checkpoint.saver import Saver, write_checkpoint
from ds_trainer.errors import CheckpointError, ResumeError

PART = "rank_00000.safetensors"
STATE = {("layer.weight", "fp32", 0): torch.arange(1000.0), ("layer.weight", "exp_avg", 0): torch.ones(1000)}


def save(folder: Path, step: int, keep_last: int = 5, **fields: object) -> Path:
    return write_checkpoint(folder, step, STATE, {"state": {"step": step}, **fields}, Keep(last=keep_last)).path


def find(folder: Path, resume: str = "auto", *, saved: bool = True) -> tuple[manager.Found | None, list[str]]:
    told: list[str] = []
    return manager.find(folder, resume, told.append, was_saved=saved), told


def test_a_saved_checkpoint_is_found_with_its_fields(tmp_path):
    path = save(tmp_path, 3)
    assert path.name == "step_00000003"
    assert (tmp_path / "latest").read_text() == path.name
    found, told = find(tmp_path)
    assert found.path == path
    assert found.manifest["state"] == {"step": 3}
    assert set(found.manifest["files"]) == {PART}
    assert told == []


def test_the_manifest_gives_back_what_json_can_hold(tmp_path):
    path = save(tmp_path, 3, extra={10: "ten", 9: (1, 2.5)}, rate=0.1 + 0.2)
    read = layout.read_manifest(path)
    assert read["extra"] == {"10": "ten", "9": [1, 2.5]}
    assert read["rate"] == 0.1 + 0.2


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    assert [path.name for path in layout.complete_checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]
    assert layout.leftovers(tmp_path) == []


def test_a_damaged_checkpoint_is_not_counted_among_those_that_are_kept(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text("{")
    save(tmp_path, 3, keep_last=2)
    assert [path.name for path in layout.complete_checkpoints(tmp_path)][::2] == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("step", [99_999_999, 100_000_000])
def test_order_is_by_step_and_not_by_name(tmp_path, step):
    save(tmp_path, 5)
    save(tmp_path, step)
    assert layout.complete_checkpoints(tmp_path)[-1].name == layout.checkpoint_name(step)


def rename_the_older_one(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step_00000001", path)


def damage_by_flip(path: Path, name: str = PART, at: int = -3) -> None:
    raw = bytearray((path / name).read_bytes())
    raw[at] ^= 1
    (path / name).write_bytes(raw)


def swap(path: Path) -> None:
    shutil.copyfile(path.parent / "step_00000001" / PART, path / PART)


DAMAGES = {
    "flipped bit": (damage_by_flip, f"{PART} does not have the content that was written"),
    "truncated": (lambda path: (path / PART).write_bytes(b"x"), f"{PART} has 1 bytes instead of "),
    "emptied": (lambda path: (path / PART).write_bytes(b""), f"{PART} has 0 bytes instead of "),
    "deleted": (lambda path: (path / PART).unlink(), f"{PART} is missing"),
    "another step's folder": (rename_the_older_one, "holds what was saved as step_00000001"),
    "that of another step": (swap, f"{PART} does not have the content that was written"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    "broken manifest": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "other format": (lambda path: (path / "manifest.json").write_text('{"format": 99}'), "is not of format 2 or 3"),
    "a digit of the manifest": (
        lambda path: damage_by_flip(path, "manifest.json", (path / "manifest.json").read_bytes().index(b'"step": 2') + 8),
        "manifest.json does not have the content that was written",
    ),
}


def test_a_checkpoint_of_format_2_is_read_and_its_damage_found(tmp_path):
    path = save(tmp_path, 1)
    fields = layout.read_manifest(path)
    for name, entry in fields["files"].items():
        del entry["xxh3_128"]
        entry["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    layout.write_manifest(path, {**fields, "format": 2})
    assert find(tmp_path)[0].path == path
    damage_by_flip(path)
    assert layout.damage(path, fields["files"], fields["files"]) == f"{PART} does not have the content that was written"


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_older_one_with_the_reason(tmp_path, kind, monkeypatch):
    spoil, words = DAMAGES[kind]
    save(tmp_path, 1)
    monkeypatch.setitem(STATE, ("layer.weight", "fp32", 0), torch.arange(1000.0) + 1)
    spoil(save(tmp_path, 2))
    found, told = find(tmp_path)
    assert found.path.name == "step_00000001"
    assert words in told[0]


def test_every_flipped_byte_of_a_manifest_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    original = (path / "manifest.json").read_bytes()
    for at in range(len(original)):
        for bit in (1, 32):
            (path / "manifest.json").write_bytes(original[:at] + bytes([original[at] ^ bit]) + original[at + 1 :])
            try:
                read = layout.read_manifest(path)
            except ValueError:
                continue
            (path / "manifest.json").write_bytes(original)
            assert read == layout.read_manifest(path), f"byte {at}: {original[at - 20 : at + 20]!r}"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_start_anew(tmp_path):
    damage_by_flip(save(tmp_path, 1))
    with pytest.raises(ResumeError, match=r"no usable checkpoint.*--resume never"):
        find(tmp_path)
    assert find(tmp_path, "never") == (None, [])


def test_a_run_whose_checkpoints_are_gone_does_not_silently_start_anew(tmp_path):
    with pytest.raises(ResumeError, match=r"this run has saved, and nothing of it is there.*--resume never"):
        find(tmp_path / "checkpoints")
    assert find(tmp_path / "checkpoints", saved=False) == (None, [])


def test_a_path_that_was_asked_for_is_taken_or_refused(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert find(tmp_path, str(first))[0].path == first
    backup = shutil.copytree(first, tmp_path / "backup")
    assert find(tmp_path, str(backup))[0].path == backup
    damage_by_flip(second)
    with pytest.raises(ResumeError, match="does not have the content"):
        find(tmp_path, str(second))
    with pytest.raises(ResumeError, match="has no manifest"):
        find(tmp_path, str(tmp_path / "nothing"))


WRITING = ("save_begin", "save_folder_made", "save_half_written", "save_before_fsync", "save_written", "save_before_manifest")
COMMITTING = ("save_manifest_written", "save_before_rename")
COMMITTED = ("save_renamed", "save_before_latest", "save_before_prune", "save_half_pruned", "save_done")


def at(monkeypatch, moment: str, act) -> None:
    monkeypatch.setattr(faults, "point", lambda name: act() if name == moment else None)


@pytest.mark.parametrize("moment", [*WRITING, *COMMITTING])
def test_a_full_disk_at_any_moment_leaves_the_older_checkpoint_and_nothing_else(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)

    def full_disk() -> None:
        raise OSError(28, "No space left on device", "a/file")

    at(monkeypatch, moment, full_disk)
    with pytest.raises(CheckpointError, match=r"rank 0: No space left on device: a/file.*step_00000001 is complete and kept"):
        save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert find(tmp_path)[0].path.name == "step_00000001"


def test_any_other_failure_of_a_rank_is_voted_on_too(tmp_path, monkeypatch):
    def fail() -> None:
        raise RuntimeError("the driver is gone")

    at(monkeypatch, "save_written", fail)
    with pytest.raises(CheckpointError, match="rank 0: RuntimeError: the driver is gone"):
        save(tmp_path, 1)


@pytest.mark.parametrize("moment", ["save_before_latest", "save_before_prune"])
def test_what_goes_wrong_after_the_commit_is_told_and_does_not_undo_it(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)

    def full_disk() -> None:
        raise OSError(28, "No space left on device", "a/file")

    at(monkeypatch, moment, full_disk)
    saved = write_checkpoint(tmp_path, 2, STATE, {}, Keep(last=1))
    assert saved.untidy == "No space left on device: a/file"
    assert find(tmp_path)[0].path == saved.path


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match=r"it takes 0\.01 MiB, and 0\.00 MiB are free.*There is no earlier checkpoint"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", [*WRITING, *COMMITTING, *COMMITTED])
def test_a_save_killed_at_any_moment_leaves_a_usable_checkpoint(tmp_path, monkeypatch, moment):
    save(tmp_path, 1, keep_last=1)

    class Killed(BaseException):
        """Not an Exception, so that nothing cleans up: as after SIGKILL."""

    def die() -> None:
        raise Killed

    at(monkeypatch, moment, die)
    with pytest.raises(Killed):
        save(tmp_path, 2, keep_last=1)
    monkeypatch.undo()
    found, told = find(tmp_path)
    assert told == []
    assert found.path.name == ("step_00000002" if moment in COMMITTED else "step_00000001")
    manager.remove_leftovers(tmp_path)
    assert layout.leftovers(tmp_path) == []
    assert save(tmp_path, 2, keep_last=1).name == "step_00000002"


def test_a_failed_save_in_the_background_is_an_error_where_it_is_asked_for(tmp_path, monkeypatch):
    writer = Saver(tmp_path, Keep(last=2), background=True)

    def written(step: int):
        writer.start(step, STATE, {})
        writer.wait()
        return writer.poll()

    assert written(1).path.name == "step_00000001"
    assert writer.poll() is None

    def full_disk() -> None:
        raise OSError(28, "No space left on device", "a/file")

    at(monkeypatch, "save_written", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        written(2)
    monkeypatch.undo()
    assert written(3).step == 3, "one failed save must not stop the next one"


def test_the_manifest_lists_sizes_and_hashes(tmp_path):
    path = save(tmp_path, 1)
    entry = json.loads((path / "manifest.json").read_text())["files"][PART]
    assert entry["xxh3_128"] == xxhash.xxh3_128((path / PART).read_bytes()).hexdigest()
    assert entry["bytes"] == (path / PART).stat().st_size > 8000
