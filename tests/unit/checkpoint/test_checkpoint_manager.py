"""A checkpoint is complete or it does not exist; what is damaged is passed over with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_trainer.checkpoint import layout, manager
from ds_trainer.errors import CheckpointError, ResumeError


def write(folder: Path, name: str) -> None:
    (folder / name / "part.bin").write_bytes(b"weights of " + name.encode())
    (folder / name / "inner").mkdir()
    (folder / name / "inner" / "more.bin").write_bytes(b"x" * 1000)


def save(folder: Path, step: int, keep_last: int = 5) -> Path:
    return manager.save(folder, step, write, {"state": {"step": step}}, keep_last=keep_last)


def find(folder: Path, resume: str = "auto", *, history: bool = True) -> tuple[manager.Found | None, list[str]]:
    told: list[str] = []
    return manager.find(folder, resume, told.append, has_history=history), told


def test_a_saved_checkpoint_is_found_with_its_fields(tmp_path):
    path = save(tmp_path, 3)
    assert path.name == "step_00000003"
    assert (tmp_path / "latest").read_text() == path.name
    found, told = find(tmp_path)
    assert found.path == path
    assert found.manifest["state"] == {"step": 3}
    assert set(found.manifest["files"]) == {"part.bin", "inner/more.bin"}
    assert told == []


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    assert [path.name for path in layout.complete_checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]
    assert layout.leftovers(tmp_path) == []


@pytest.mark.parametrize("step", [99_999_999, 100_000_000])
def test_order_is_by_step_and_not_by_name(tmp_path, step):
    save(tmp_path, 5)
    save(tmp_path, step)
    assert layout.complete_checkpoints(tmp_path)[-1].name == layout.checkpoint_name(step)


def damage_by_flip(path: Path) -> None:
    raw = bytearray((path / "part.bin").read_bytes())
    raw[3] ^= 1
    (path / "part.bin").write_bytes(raw)


DAMAGES = {
    "flipped bit": (damage_by_flip, "part.bin does not have the content that was written"),
    "truncated": (lambda path: (path / "inner/more.bin").write_bytes(b"x"), "inner/more.bin has 1 bytes instead of 1000"),
    "deleted": (lambda path: (path / "part.bin").unlink(), "part.bin is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    "broken manifest": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "other format": (lambda path: (path / "manifest.json").write_text('{"format": 99}'), "of another format"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_older_one_with_the_reason(tmp_path, kind):
    spoil, words = DAMAGES[kind]
    save(tmp_path, 1)
    spoil(save(tmp_path, 2))
    found, told = find(tmp_path)
    assert found.path.name == "step_00000001"
    assert words in told[0]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_start_anew(tmp_path):
    damage_by_flip(save(tmp_path, 1))
    with pytest.raises(ResumeError, match=r"no usable checkpoint.*--resume never"):
        find(tmp_path)
    assert find(tmp_path, "never") == (None, [])


def test_a_path_that_was_asked_for_is_taken_or_refused(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert find(tmp_path, str(first))[0].path == first
    damage_by_flip(second)
    with pytest.raises(ResumeError, match="does not have the content"):
        find(tmp_path, str(second))
    with pytest.raises(ResumeError, match="has no manifest"):
        find(tmp_path, str(tmp_path / "nothing"))


def test_a_failed_save_leaves_the_older_checkpoint_and_nothing_else(tmp_path):
    save(tmp_path, 1)

    def full_disk(folder: Path, name: str) -> None:
        (folder / name / "part.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*step_00000001 is complete and kept"):
        manager.save(tmp_path, 2, full_disk, {}, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert find(tmp_path)[0].path.name == "step_00000001"


@pytest.mark.parametrize("moment", ["fsync_file", "write_manifest", "_write_latest", "_remove"])
def test_a_save_killed_at_any_moment_leaves_a_usable_checkpoint(tmp_path, monkeypatch, moment):
    save(tmp_path, 1, keep_last=1)

    class Killed(BaseException):
        """Not an Exception, so that nothing cleans up: as after SIGKILL."""

    calls = 0

    def die(*args, **kwargs):
        nonlocal calls
        calls += 1
        if moment != "_remove" or calls == 3:  # the third removal is that of the older checkpoint
            raise Killed
        return original(*args, **kwargs)

    owner = manager if hasattr(manager, moment) else layout
    original = getattr(owner, moment)
    monkeypatch.setattr(owner, moment, die)
    with pytest.raises(Killed):
        save(tmp_path, 2, keep_last=1)
    monkeypatch.undo()
    found, _ = find(tmp_path)
    assert found.path.name in ("step_00000001", "step_00000002")
    manager.remove_leftovers(tmp_path)
    assert layout.leftovers(tmp_path) == []
    assert save(tmp_path, 2, keep_last=1).name == "step_00000002"


def test_the_manifest_lists_sizes_and_hashes(tmp_path):
    path = save(tmp_path, 1)
    entry = json.loads((path / "manifest.json").read_text())["files"]["inner/more.bin"]
    assert entry == {"bytes": 1000, "sha256": "44f8354494a5ba03ba1792a8d3e9c534c47a9181980fde7a3f44b06ef2ae7c7f"}
