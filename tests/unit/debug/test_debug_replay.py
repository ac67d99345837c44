"""What a run folder tells of a crash, and what it cannot tell."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from ds_trainer import whereabouts
from ds_trainer.arguments.merge import resolve
from ds_trainer.arguments.report import resolved_as_json
from ds_trainer.debug.replay import read_crash, require_same_data, to_its_folder, write_settings
from ds_trainer.errors import DataError, RefusedError
from ds_trainer.monitor.run_folder import RunFolder

STARTED = {"launcher": "torchrun", "world_size": 4, "data": "abc"}
SKIPPED = {"step": 12, "micro_batches": {"3": [2]}, "samples": ["a.jsonl:7"], "num_samples": 1}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of four ranks that failed at step 12, with checkpoints of steps 8 and 10."""
    folder = RunFolder(tmp_path / "run", 3)
    folder.create()
    folder.write_json("resolved.json", {})
    folder.event("started_anew")
    folder.event("started", **STARTED)
    for step in (8, 10):
        folder.event("saved", step=step)
        (folder.checkpoints / f"step_{step:08d}").mkdir(parents=True)
    folder.event("skipped", **SKIPPED)
    monkeypatch.setattr(whereabouts, "now", whereabouts.now)
    return folder


def failed(folder: RunFolder, code: int = 6, reason: str = "step 12: the loss\nis not finite", at: int | None = 12) -> None:
    if at:
        whereabouts.at("logging", at)
    folder.finish(code, reason, step=10, command=None)


def test_step_ranks_micro_batches_and_the_checkpoint_before_it_are_found(run):
    failed(run)
    crash = read_crash(run.path, None)
    assert (crash.step, crash.world_size, crash.micro_batches) == (12, 4, {3: [1]})
    assert (crash.reason, crash.checkpoint) == ("step 12: the loss", run.checkpoints / "step_00000010")
    told = json.loads((run.path / "exit.json").read_text())
    assert (told["rank"], told["at_step"]) == (3, 12)
    earlier = read_crash(run.path, 9)
    assert (earlier.step, earlier.micro_batches, earlier.checkpoint) == (9, {}, run.checkpoints / "step_00000008")


def test_a_crash_before_the_first_checkpoint_is_replayed_from_nothing(run):
    failed(run)
    assert read_crash(run.path, 8).checkpoint is None


def test_a_later_start_is_the_one_that_counts(run):
    failed(run)
    run.event("resumed", step=10)
    run.event("started", **{**STARTED, "world_size": 2})
    failed(run, code=7, reason="no progress", at=11)
    crash = read_crash(run.path, None)
    assert (crash.step, crash.world_size, crash.micro_batches, crash.reason) == (11, 2, {}, "no progress")


def test_what_cannot_be_replayed_is_refused_with_the_reason(run, tmp_path):
    def refused(words, step=None, path=None):
        with pytest.raises(RefusedError, match=words):
            read_crash(path or run.path, step)

    refused("is no run folder", path=tmp_path)
    (run.path / "metrics.jsonl").write_text('{"step": 11}\n{"step"')
    refused("left no account of its end: .* --step 12 is the first one after the last that was logged")
    assert read_crash(run.path, 12).reason == "no word: it still runs, or was killed"
    for code, reason, words in (
        (0, "done", r"the run did not fail \(done\)"),
        (75, "stopped by SIGTERM", "did not fail"),
        (130, "stopped by SIGINT", "did not fail"),
        (5, "disk full", r"not a step failed but a checkpoint \(disk full\)"),
    ):
        run.event("started", **STARTED)
        failed(run, code, reason)
        refused(words)
    run.event("started", **STARTED)
    run.event("ended", code=6, reason="NaN")
    refused("a version that does not say at which step it failed .NaN.. Add --step")
    run.event("started", **STARTED)
    run.event("ended", code=1, reason="no model", at_step=None)
    refused("failed before its first step .no model.")


def test_no_start_at_all_is_said(run):
    (run.path / "events.jsonl").write_text('{"event": "ended", "code": 2, "reason": "refused"}\n')
    with pytest.raises(RefusedError, match="no start of this run got as far as its first step"):
        read_crash(run.path, None)


def test_a_checkpoint_that_is_gone_is_missed(run):
    failed(run)
    for path in list(run.checkpoints.iterdir()):
        shutil.rmtree(path)
    with pytest.raises(RefusedError, match=r"to replay step 12, .*one of step 10, and it is gone \(there is none\)"):
        read_crash(run.path, None)


def test_data_that_changed_is_refused(run):
    failed(run)
    crash = read_crash(run.path, None)
    require_same_data(crash, "abc")
    with pytest.raises(DataError, match=r"the data has changed since the run \(fingerprint abd, then abc\)"):
        require_same_data(crash, "abd")


def test_the_settings_are_those_that_were_in_force_whatever_became_of_the_files(run_file, tmp_path):
    engine = {"train_batch_size": 8, "bf16": {"enabled": True}, "gradient_clipping": 0.5, "optimizer": {"type": "AdamW"}}
    engine["optimizer"]["params"] = {"lr": 0.5, "torch_adam": True}
    engine["zero_optimization"] = {"stage": 3, "sub_group_size": 1000}
    (tmp_path / "ds.json").write_text(json.dumps(engine))
    nothing = dict.fromkeys(("learning_rate", "global_batch_size", "precision"))
    config = run_file("run", deepspeed={"zero_optimization": {}}, train=nothing)
    words = ["train.global_batch_size=4", "train.precision=fp32", "train.schedule=linear", "train.learning_rate=0.25"]
    then = resolve(config, deepspeed=tmp_path / "ds.json", overrides=words)
    folder = RunFolder(tmp_path / "kept", 0)
    folder.create()
    folder.write_json("resolved.json", resolved_as_json(then))
    config.write_text("gone")
    (tmp_path / "ds.json").unlink()

    now = resolve(write_settings(folder.path))
    ours, theirs = now.settings.model_dump(), then.settings.model_dump()
    assert ours.pop("checkpoint") == {**theirs.pop("checkpoint"), "folder": str(folder.path)}
    ours.pop("deepspeed"), theirs.pop("deepspeed")
    assert ours == theirs
    assert (ours["train"]["global_batch_size"], ours["train"]["precision"], ours["train"]["max_grad_norm"]) == (4, "fp32", 0.5)
    assert now.deepspeed.plain()["zero_optimization"] == engine["zero_optimization"]
    assert now.deepspeed.plain()["optimizer"] == {"type": "AdamW", "params": {"torch_adam": True}}
    assert yaml.safe_load((folder.path / "debug" / "replayed.yaml").read_text())["train"]["schedule"] == "linear"


def test_relative_paths_are_from_where_the_run_was_started(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    there = tmp_path / "there"
    there.mkdir()
    run.write_json("environment.json", {"folder": str(there)})
    to_its_folder(run.path, said.append)
    assert (Path.cwd(), said) == (there, [f"relative paths are from {there}"])
    run.write_json("environment.json", {"folder": str(tmp_path / "elsewhere")})
    to_its_folder(run.path, said.append)
    assert said[1] == f"relative paths are from {there}; {tmp_path / 'elsewhere'} is not here"
    os.chdir(tmp_path)
