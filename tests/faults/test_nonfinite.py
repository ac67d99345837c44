"""A number that is not finite never reaches the weights, on any rank, and whoever had it is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import Done, metrics, run_command, torchrun

pytestmark = pytest.mark.launch

WORKERS = Path(__file__).parent / "workers"
PLACES = (("loss", 0), ("value", 1), ("gradient", 0))
CASES = [
    *([s, p, False, rank, w] for s in (1, 2, 3) for p in ("bf16", "fp32") for w, rank in PLACES),
    *([s, p, True, 1, w] for s in (1, 2, 3) for p in ("bf16", "fp32") for w in ("value", "gradient")),
    *([s, "fp16", False, 1, "gradient"] for s in (1, 2, 3)),
    [2, "fp16 at its lowest scale", False, 1, "gradient"],
    [3, "fp16 at its lowest scale", False, 1, "gradient"],
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("poisoned") / "out.json"
    done = run_command(torchrun(2, str(WORKERS / "poisoned.py"), str(out), json.dumps(CASES)), cwd=out.parent)
    assert done.code == 0, done.text[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_the_step_is_left_out_on_all_ranks_and_the_next_one_moves_the_weights(outcomes, index):
    found = outcomes[index]
    assert found["case"] == CASES[index]
    _, precision, _, rank, place = found["case"]
    for number, facts in enumerate(found["ranks"]):
        assert facts["applied"] == [True, False, True]
        assert facts["moved"] == [True, False, True]
        assert facts["grad_norm"][1] == float("inf")
        assert all(0 < facts["grad_norm"][step] < 10 for step in (0, 2))
        assert facts["finite"] == [True, place == "gradient" or number != rank, True]
        assert facts["seeks"] == [precision == "fp16"] * 3


def train(config: Path, poison: str, *overrides: str) -> Done:
    arguments = ["train", "--config", str(config), *overrides]
    return run_command(torchrun(2, str(WORKERS / "poisoned_run.py"), poison, *arguments), cwd=config.parent)


def ended(run: Path) -> dict:
    return json.loads((run / "exit.json").read_text())


def events(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_the_policy_stop_ends_the_run_and_names_rank_micro_batch_and_samples(run_file, corpus, tmp_path):
    stage = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    config = run_file("run", train={"on_nonfinite": "stop", "max_steps": 6}, checkpoint={"every_steps": 1}, deepspeed=stage)
    done = train(config, "1:3")
    run = tmp_path / "run"
    account = ended(run)
    assert (account["code"], account["step"]) == (6, 2), "the checkpoint of the step before is the last"
    begin = f"step 3: the loss is not finite on rank 1 (micro-batch 2), computed from {corpus / 'texts.jsonl'}:"
    assert account["reason"].startswith(begin)
    assert re.match(r"\d+.*\. The weights were left as they were\. train\.on_nonfinite = stop", account["reason"][len(begin) :])
    assert done.text.count("step 3: the loss is not finite on rank 1") == 2, "when it is met, and in the last words"
    [event] = events(run, "skipped")
    assert (event["step"], event["micro_batches"]) == (3, {"1": [2]})
    assert event["num_samples"] >= len(event["samples"]) >= 1


def test_a_run_that_left_out_steps_is_resumed_bit_for_bit_and_goes_on_counting(run_file, tmp_path):
    config = run_file("whole", train={"max_steps": 6, "schedule": "cosine"}, checkpoint={"every_steps": 3, "keep_last": 5})
    whole, again, late = (tmp_path / name for name in ("whole", "again", "late"))
    done = train(config, "0:2,3")
    assert done.code == 0, done.text
    assert [event["step"] for event in events(whole, "skipped")] == [2, 3]
    assert done.text.count("SKIPPED step 2: the loss is not finite on rank 0 (micro-batch 2), computed from ") == 1
    manifests = [json.loads((whole / f"checkpoints/step_0000000{step}/manifest.json").read_text()) for step in (3, 6)]
    assert [each["state"]["skipped_in_a_row"] for each in manifests] == [2, 0]

    for other in (again, late):
        shutil.copytree(whole, other)
        shutil.rmtree(other / "checkpoints" / "step_00000006")
    done = train(config, "0:2,3", f"checkpoint.folder={again}")
    assert done.code == 0, done.text
    hexes = [[repr(line["loss"]) for line in metrics(folder)][-3:] for folder in (whole, again)]
    assert hexes[0] == hexes[1]
    resumed = json.loads((again / "checkpoints/step_00000006/manifest.json").read_text())
    assert (resumed["state"], resumed["probe"]) == (manifests[1]["state"], manifests[1]["probe"])

    done = train(config, "0:4", f"checkpoint.folder={late}", "train.max_skipped_steps=2")
    account = ended(late)
    assert (account["code"], account["step"]) == (6, 3), done.text
    assert "That is step 3 in a row, and train.max_skipped_steps = 2." in account["reason"]


def test_weights_that_compute_nothing_finite_are_never_saved(run_file, tmp_path):
    config = run_file("run", checkpoint={"every_steps": 2})
    done = train(config, "0:probe")
    account = ended(tmp_path / "run")
    assert (account["code"], account["step"]) == (6, None), done.text
    assert account["reason"].startswith(
        "step 2: no checkpoint is written, for with these weights the loss of the probe rows is nan"
    )
    assert list((tmp_path / "run" / "checkpoints").glob("step_*")) == []
