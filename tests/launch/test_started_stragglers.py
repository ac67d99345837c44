"""A rank that holds the others up is named, for slow compute and for slow data; an even run names nobody."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from forks import Command, run_all
from helpers import ROOT, TINY_LLAMA, metrics

pytestmark = pytest.mark.launch

UNEVEN = str(Path(__file__).parent / "workers" / "uneven.py")
NOBODY, SLOW_DATA, SLOW_COMPUTE = "-1", "0", "1"


def test_the_slow_rank_is_named_at_each_stage_and_in_what_it_is_slow(run_file, corpus, tmp_path):
    wide = {**TINY_LLAMA, "hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 256}
    runs = {
        "slow2": (2, wide, SLOW_COMPUTE, SLOW_DATA),
        "slow3": (3, wide, SLOW_COMPUTE, SLOW_DATA),
        "even3": (3, TINY_LLAMA, NOBODY, NOBODY),
    }
    commands = {}
    for name, (stage, model, compute, data) in runs.items():
        zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        config = run_file(
            name,
            model={"config": {**model, "max_position_embeddings": 256}, "tokenizer": str(corpus / "tokenizer")},
            data={"seq_len": 256, "workers": 0},
            train={"max_steps": 8, "micro_batch_size": 2},
            deepspeed={"zero_optimization": zero},
        )
        commands[name] = Command([compute, data, "train", "--config", str(config)], ranks=2, script=UNEVEN)
    rows = [line.split("|")[1] for line in (ROOT / "docs/monitoring.md").read_text().splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    shown = run_all(commands, tmp_path)
    for name, done in shown.items():
        assert done.codes == [0, 0], done.text
        lines, run = metrics(tmp_path / name), tmp_path / name
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        named = {(each["rank"], each["what"]) for each in events if each["event"] == "straggler"}
        assert all(line["stragglers"] == [] for line in lines[:7]), "a few steps make no straggler"
        fields = {*lines[-1], *(f"by_rank.{each}" for each in lines[-1]["by_rank"])} - {"by_rank"}
        assert fields == documented, "docs/monitoring.md lists every field"
        for values in lines[-1]["by_rank"].values():
            assert len(values) == 2
        assert lines[-1]["step_seconds"] == pytest.approx(max(lines[-1]["by_rank"]["step_seconds"]), abs=1e-4)
        if name.startswith("even"):
            assert named == set()
            assert "SLOW" not in done.text
            continue
        assert named == {(1, "forward"), (0, "data")}, lines[-1]
        assert {(each["rank"], each["what"]) for each in lines[-1]["stragglers"]} == named
        last = next(line for line in done.text.splitlines() if line.startswith("step 8/8"))
        assert "  SLOW: rank 1 on " in last
        assert "; rank 0 on " in last
        steps = [line["by_rank"]["step_seconds"] for line in lines[1:]]
        assert max(abs(first - second) / second for first, second in steps) < 0.2, "what a step takes tells nothing"
        waits = [line["by_rank"]["data_wait_seconds"] for line in lines]
        assert min(slow for slow, _ in waits) > 0.1
