"""Which checkpoint a start goes on from, when it refuses to, and what export makes of it."""

import json
import shutil
import subprocess
from pathlib import Path

from forks import Command, run_all
from helpers import metrics

STEPS = {"train": {"max_steps": 4}, "checkpoint": {"every_steps": 2, "keep_last": 5}}


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def test_a_start_takes_the_newest_whole_checkpoint_of_its_own_run_or_refuses(run_file, tmp_path):
    base = run_file("base", **STEPS)
    train = ["train", "--config", str(base)]
    first = run_all({"first": Command(train)}, tmp_path)["first"]
    assert first.codes == [0], first.text
    assert names(tmp_path / "base") == ["step_00000002", "step_00000004"]

    def copy(name: str, *damaged: int, remove: str = "") -> str:
        shutil.copytree(tmp_path / "base", tmp_path / name)
        for step in damaged:
            flip_a_byte(next((tmp_path / name / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")))
        if remove:
            (tmp_path / name / "checkpoints" / remove).unlink()
        return f"checkpoint.folder={tmp_path / name}"

    def export(run: str, to: str, *more: str) -> Command:
        return Command(["export", "--run", str(tmp_path / run), "--to", str(tmp_path / to), *more])

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    other_model = tmp_path / "other.yaml"
    other_model.write_text(base.read_text().replace("hidden_size: 32", "hidden_size: 16"))
    older = str(tmp_path / "base" / "checkpoints" / "step_00000002")
    commands = {
        "flipped": Command([*train, copy("flipped", 4), "checkpoint.keep_last=1"]),
        "flipped_export": export("flipped_for_export", "older"),
        "all_flipped": Command([*train, copy("all_flipped", 2, 4)]),
        "no_manifest": Command([*train, copy("no_manifest", remove="step_00000004/manifest.json")]),
        "other_seed": Command([*train, copy("other_seed"), "train.seed=7"]),
        "other_rate": Command([*train, copy("other_rate"), "train.learning_rate=0.02"]),
        "other_ranks": Command([*train, copy("other_ranks")], ranks=2),
        "other_model": Command(["train", "--config", str(other_model), copy("other_model")]),
        "never": Command([*train, copy("never"), "--resume", "never", "train.max_steps=2"]),
        "by_path": Command([*train, copy("by_path"), "--resume", older]),
        "by_wrong_path": Command([*train, "--resume", str(tmp_path / "base" / "checkpoints" / "step_00000003")]),
        "complete": Command([*train, copy("complete")]),
        "export": export("base", "exported"),
        "export_by_name": export("base", "exported-2", "--checkpoint", "step_00000002"),
        "export_over_files": export("base", "full"),
        "export_of_nothing": export("nowhere", "exported-3"),
        "export_unknown": export("base", "exported-4", "--checkpoint", "step_00000003"),
        "export_merge": export("base", "exported-5", "--merge"),
        "export_under_a_file": export("base", "full/mine.txt/x"),
    }
    copy("flipped_for_export", 4)
    shown = run_all(commands, tmp_path)

    def refused(name: str, *words: str) -> None:
        said = " ".join(shown[name].text.split())
        assert shown[name].codes[0] == (2 if name.startswith("export") else 4), said
        assert said.count("ds_trainer: ") == 1, said
        assert "Traceback" not in said
        for each in words:
            assert each in said

    def done(name: str, *words: str) -> None:
        assert set(shown[name].codes) == {0}, shown[name].text
        for each in words:
            assert each in shown[name].text

    passed_over = "step_00000004 is passed over: it rank_00000.safetensors does not have the content"
    done(
        "flipped", passed_over, "flipped/checkpoints/step_00000002: step 2, 8 rows consumed", "renamed to aside_1_step_00000004"
    )
    assert names(tmp_path / "flipped") == ["aside_1_step_00000004", "step_00000004"], "a new save counted the damaged one"
    assert [line["step"] for line in metrics(tmp_path / "flipped")] == [1, 2, 3, 4, 3, 4]
    assert metrics(tmp_path / "flipped")[-1]["loss"] == metrics(tmp_path / "flipped")[3]["loss"]
    done("flipped_export", passed_over, "(step 2) in fp32")
    refused("all_flipped", "holds no usable checkpoint", "step_00000002 rank_00000.safetensors", "--resume never")
    done("no_manifest", "step_00000004 is passed over: it has no manifest.json", "step 2, 8 rows consumed")

    refused("other_seed", "step_00000004 cannot be continued: it has seed = 0, this run has 7", "--resume never")
    refused("other_rate", "it has learning_rate = 0.01, this run has 0.02")
    kept = json.loads((tmp_path / "other_rate" / "resolved.json").read_text())
    assert kept["train.learning_rate"]["value"] == 0.01, "a refused start must not rewrite what the run is"
    done("other_ranks", "saved on 1 rank, ZeRO-2, laid out anew for 2 ranks, ZeRO-2")
    refused("other_model", "it has fingerprint of the model's config = ", ", this run has ")
    assert names(tmp_path / "other_seed") == ["step_00000002", "step_00000004"]
    done("never", "step_00000002 does not belong to what is trained from here on", "done: 2 steps")
    assert names(tmp_path / "never") == ["aside_1_step_00000002", "aside_1_step_00000004", "step_00000002"]
    done("by_path", f"RESUMING from {older}: step 2")
    refused("by_wrong_path", "write auto, never or the folder of a checkpoint. This run has")
    done("complete", "RESUMING from", "done: 4 steps")

    done("export", "(step 4) in fp32", "loss on 4 rows", "the model is in")
    done("export_by_name", "(step 2) in fp32")
    refused("export_over_files", "full: exists and is not empty", "--to")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    refused("export_of_nothing", "nowhere: holds no complete checkpoint")
    refused("export_unknown", "step_00000003: no such checkpoint", "There are step_00000002, step_00000004")
    refused("export_merge", "there is no adapter to merge. Leave --merge out")
    refused("export_under_a_file", "mine.txt/x: cannot be written (Not a directory)")
    assert not list(tmp_path.glob(".partial-*"))


def test_a_full_disk_keeps_the_earlier_checkpoint_and_the_run_goes_on_when_there_is_space(run_file, tmp_path, small_disk):
    config = run_file("run", data={"cache_folder": str(tmp_path / "cache")}, **STEPS)
    run = small_disk / "run"
    train = Command(["train", "--config", str(config), f"checkpoint.folder={run}"], ranks=2)
    full = run_all({"full": train}, tmp_path)["full"]
    assert full.codes == [5, 5], full.text
    said = " ".join(full.text.split())
    assert said.count("the checkpoint step_00000004 could not be written in") == 1, full.text
    for words in ("MiB are free", "step_00000002 is complete and kept", "Free space", "goes on from step 2"):
        assert words in said
    assert "Traceback (most" not in full.text
    assert names(run) == ["step_00000002"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000002"

    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    more = run_all({"more": train}, tmp_path)["more"]
    assert more.codes == [0, 0], more.text
    assert "checkpoints/step_00000002: step 2, 8 rows consumed" in more.text
    assert names(run) == ["step_00000002", "step_00000004"]
