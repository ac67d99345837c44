"""Damage to the files of a checkpoint is noticed and the older one taken; a full disk costs a checkpoint, not the run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from corruptions import NEWEST, OLDER, damages, make_checkpoints, spoiled_pointers, taken_after
from crash_points import ZERO2
from forks import Command, Forks
from helpers import metrics

from ds_trainer.checkpoint import layout


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture(scope="module")
def checkpoints(forks, tmp_path_factory) -> Path:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"), forks, ZERO2)


def test_every_damage_is_noticed_and_the_older_checkpoint_taken(checkpoints, tmp_path):
    tried = 0
    for kind, file, damage in damages(flips=5, seed=7):
        taken, told = taken_after(damage, checkpoints, tmp_path)
        assert taken == OLDER, f"{file}, {kind}"
        assert [f"{NEWEST} is passed over" in line for line in told] == [True], f"{file}, {kind}: {told}"
        tried += 1
    assert tried == 3 * 9 + 2


def test_the_newest_is_taken_whatever_latest_says(checkpoints, tmp_path):
    for kind, _, spoil in spoiled_pointers():
        assert taken_after(spoil, checkpoints, tmp_path) == (NEWEST, []), kind
    assert taken_after(lambda folder: None, checkpoints, tmp_path) == (NEWEST, [])


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_a_run_that_may_go_on_without_a_checkpoint_does_and_says_which_one_it_has(run_file, tmp_path, small_disk, forks):
    config = run_file(
        "run",
        data={"cache_folder": str(tmp_path / "cache")},
        train={"max_steps": 8},
        checkpoint={"every_steps": 2, "keep_last": 5, "on_failure": "continue"},
    )
    run = small_disk / "run"
    train = Command(["train", "--config", str(config), f"checkpoint.folder={run}"], ranks=2)
    full = forks.run(train)
    assert full.codes == [5, 5], "the last checkpoint is what a run is made for"
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6, 7, 8]
    told = [(each["event"], each.get("step")) for each in events(run)]
    assert told[2:6] == [("saved", 2), ("not_saved", None), ("not_saved", None), ("not_saved", None)], told
    reasons = [each["reason"] for each in events(run) if each["event"] == "not_saved"]
    for step, reason in zip((4, 6, 8), reasons, strict=True):
        assert f"step_{step:08d} could not be written in" in reason
        assert "step_00000002 is complete and kept" in reason
    assert full.text.count("NOT SAVED, training goes on") == 3
    assert "done: 8 steps" not in full.text
    assert [path.name for path in layout.complete_checkpoints(run / "checkpoints")] == ["step_00000002"]
    assert layout.leftovers(run / "checkpoints") == []
    ended = json.loads((run / "exit.json").read_text())
    assert (ended["code"], ended["step"]) == (5, 2)
    assert "the checkpoint step_00000008 could not be written" in ended["reason"]

    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    more = forks.run(train)
    assert more.codes == [0, 0], more.text
    assert "checkpoints/step_00000002: step 2, 8 rows consumed" in more.text
    losses: dict[int, set[str]] = {}
    for line in metrics(run):
        losses.setdefault(line["step"], set()).add(line["loss"].hex())
    assert [len(losses[step]) for step in range(1, 9)] == [1] * 8
    assert layout.complete_checkpoints(run / "checkpoints")[-1].name == "step_00000008"
