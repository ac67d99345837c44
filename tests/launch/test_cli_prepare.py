"""`ds_trainer prepare` as its users meet it, and a stream that is stopped and goes on."""

import json
import os
import signal
import subprocess
import time

import pytest
from helpers import clean_environment, metrics, run_command, torchrun

PREPARE = ["ds_trainer", "prepare", "--config"]
DEFECTS = {
    2: (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    5: (b'{"text": "one", "text": "two"}', "duplicate key"),
    8: (b'{"text": NaN}', "not a finite number"),
    11: (b'{"body": "three"}', "missing key"),
    14: (b'["text"]', "not an object"),
    17: (b'{"text": 7}', "wrong type"),
    19: (b'{"text": "cut', "truncated last line"),
}


@pytest.fixture
def defects(tmp_path):
    lines = [json.dumps({"text": f"the model reads row {n} of the tokens"}).encode() for n in range(1, 20)]
    for line, (raw, _) in DEFECTS.items():
        lines[line - 1] = raw
    path = tmp_path / "planted.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_every_bad_record_is_listed_with_its_line_and_its_reason(run_file, defects, tmp_path):
    config = run_file("bad", data={"sources": [{"path": "planted.jsonl"}]})
    refused = run_command([*PREPARE, str(config)], cwd=tmp_path, timeout=60)
    assert refused.code == 3, refused.text
    assert "planted.jsonl: 7 bad records (" in refused.err
    report = json.loads((tmp_path / "bad" / "data_report.json").read_text())
    [source] = report["data"]["sources"]
    found = {each["line"]: each["reason"] for each in source["bad_records"]}
    assert found == {line: reason for line, (_, reason) in DEFECTS.items()}
    assert (source["read"], source["documents"], source["bad"]) == (19, 12, 7)

    allowed = ["data.on_bad_record=skip", "data.max_bad_fraction=0.5", "train.max_steps=1", "train.global_batch_size=1"]
    skipped = run_command([*PREPARE, str(config), "--show", "2", *allowed], cwd=tmp_path, timeout=60)
    assert skipped.code == 0, skipped.text
    assert "tokenising" not in skipped.out, "the verdict changed, not the tokens"
    assert "19 read, 12 kept, 7 left out" in skipped.out
    assert "planted.jsonl:3: 10 tokens, 10 trained\n[[the model reads row 3 of the tokens<|end|>]]" in skipped.out
    assert "Run: 1 steps, 1 rows" in skipped.out


def test_a_killed_prepare_goes_on_where_it_was(run_file, tmp_path):
    text = "the model reads a row of tokens and predicts the next one from all before it " * 8
    with open(tmp_path / "long.jsonl", "w") as file:
        for number in range(12_000):
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    config = run_file("long", data={"sources": [{"path": "long.jsonl"}]})
    script = "import ds_trainer.data.prepare as p; p._KEEP_SECONDS = 0.0; from ds_trainer.cli import main; main()"
    command = ["python", "-c", script, "prepare", "--config", str(config), "--workers", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.DEVNULL)
    cache = tmp_path / "data_cache"
    end = time.monotonic() + 60
    while not (kept := list(cache.glob(".tokens_*/progress.json"))) or json.loads(kept[0].read_text())["tally"]["chunks"] < 2:
        assert process.poll() is None, "it must be caught at work"
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("tokens_*/meta.json"))
    again = run_command([*PREPARE, str(config)], cwd=tmp_path, timeout=120)
    assert again.code == 0, again.text
    assert "taken up after" in again.out
    assert "12,000 read, 12,000 kept, 0 left out" in again.out
    [store] = cache.glob("tokens_*/meta.json")
    assert json.loads(store.read_text())["documents"] == 12_000


@pytest.mark.launch
def test_a_stream_goes_on_with_the_very_next_row(run_file, corpus, tmp_path):
    sections = {
        "data": {"streaming": True},
        "evaluate": {"sources": [{"path": str(corpus / "texts.jsonl"), "max_samples": 10}]},
    }
    whole = run_file("whole", checkpoint={"folder": str(tmp_path / "whole")}, **sections)
    train = ["-m", "ds_trainer", "train", "--config"]
    commands = [
        torchrun(2, *train, str(whole)),
        torchrun(2, *train, str(whole), f"checkpoint.folder={tmp_path}/parts", "train.max_steps=2"),
        torchrun(2, *train, str(whole), f"checkpoint.folder={tmp_path}/parts", "data.workers=0"),
    ]
    for command in commands:
        done = run_command(command, cwd=tmp_path, timeout=120)
        assert done.code == 0, done.text
    assert "RESUMING from" in done.out
    losses = {name: [line["loss"].hex() for line in metrics(tmp_path / name)] for name in ("whole", "parts")}
    assert losses["parts"] == losses["whole"]
    assert len(losses["whole"]) == 4
