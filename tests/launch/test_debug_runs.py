"""`debug` beside real runs of two ranks: the same losses, micro-batch by micro-batch; a crash found again; 64 GPUs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from forks import Command, Forks
from helpers import TINY_LLAMA, metrics, write_base

pytestmark = pytest.mark.launch

WORKERS = Path(__file__).parent / "workers"
ODD = 5
"""The token of the one % in the data."""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks")) as running:
        yield running


def share(folder: Path, rank: int, step: int) -> list[float]:
    """What a rank saw of a step in the real run: each micro-batch's share of the loss."""
    lines = [json.loads(line) for line in (folder / f"seen_{rank}.jsonl").read_text().splitlines()]
    return [loss for at, loss in lines if at == step]


def test_one_process_sees_what_each_rank_saw_with_its_dropout(forks, run_file, corpus, tmp_path):
    model = {"config": {**TINY_LLAMA, "attention_dropout": 0.1}, "tokenizer": str(corpus / "tokenizer")}
    config = run_file("run", model=model, train={"global_batch_size": 8}, checkpoint={"every_steps": 2, "keep_last": 2})
    arguments = ["--config", str(config)]
    seen = Command([str(tmp_path / "seen"), "train", *arguments], ranks=2, script=str(WORKERS / "recorded.py"))
    done = forks.run(seen)
    assert done.codes == [0, 0], done.text

    done = forks.run(Command(["debug", *arguments, "--from", "step_00000002", "--rank", "1", "--rows", "1"]))
    assert done.codes == [0], done.text
    lines = [json.loads(line) for line in (tmp_path / "run/debug/metrics.jsonl").read_text().splitlines()]
    assert [line["share"] for line in lines] == share(tmp_path, rank=1, step=3), "bit for bit"
    assert [(line["step"], line["rank"], line["micro_batch"]) for line in lines] == [(3, 1, each) for each in (1, 2, 3, 4)]
    assert "row 0 (rank 1, micro-batch 1): 48 tokens" in done.text
    assert f"--- {lines[0]['samples'][0]}\n" in done.text
    assert re.fullmatch(r".*/texts\.jsonl:\d+", lines[0]["samples"][0])
    assert "weights and optimizer: those after step 2 (" in done.text

    done = forks.run(Command(["debug", *arguments, "--from", str(tmp_path / "run/checkpoints/step_00000002"), "--rows", "0"]))
    assert done.codes == [0], done.text
    of_run, of_debug = metrics(tmp_path / "run")[2:], metrics(tmp_path / "run/debug")
    assert [line["step"] for line in of_debug] == [3, 4]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in of_debug] == pytest.approx([line[name] for line in of_run], abs=1e-5)

    step_4 = ["--world-size", "2", "--step", "4", "--rank", "1"]
    done = forks.run(Command(["debug", *arguments, *step_4]))
    assert done.codes == [0], done.text
    assert (
        "the INITIAL ones; only data and dropout are those of step 4. For its weights: --from a checkpoint of step 3"
        in done.text
    )
    refused = forks.run(Command(["debug", *arguments, "--from", "step_00000003"]))
    assert refused.codes == [4]
    assert "step_00000003: there is no such folder. There is " in refused.text


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """A folder with a small pretrained model and its tokenizer."""
    return write_base(corpus, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", ["value", "slope"])
def test_a_crash_under_zero3_with_lora_is_found_again_by_module_and_sample(forks, run_file, corpus, base, tmp_path, kind):
    lines = (corpus / "texts.jsonl").read_text().splitlines()
    lines[56] = json.dumps({"text": json.loads(lines[56])["text"] + " %"})
    odd = tmp_path / "odd.jsonl"
    odd.write_text("\n".join(lines) + "\n")
    config = run_file(
        "run",
        model={"path": str(base)},
        data={"sources": [{"path": "odd.jsonl", "format": "text"}]},
        train={"max_steps": 6, "on_nonfinite": "skip"},
        adapter={"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
        deepspeed={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        checkpoint={"every_steps": 2, "keep_last": 1},
    )
    run = tmp_path / "run"
    here = {"script": str(WORKERS / "spoiled.py")}
    arguments = [kind, str(ODD), "train", "--config", str(config), "train.on_nonfinite=stop"]
    crashed = forks.run(Command(arguments, ranks=2, folder=str(tmp_path), **here))
    assert 6 in crashed.codes, crashed.text
    ended = json.loads((run / "exit.json").read_text())
    step = ended["at_step"]
    [skipped] = [
        event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == "skipped"
    ]
    config.write_text("the file has changed since")

    replay = [kind, str(ODD), "debug", "--replay", str(run)]
    found = forks.run(Command(replay, **here))
    assert found.codes == [6], found.text
    told = found.text[found.text.index("ds_trainer: step") :]
    assert f"replaying step {step} of {run}, after step {step - 1}. It ended with: step {step}: " in found.text
    assert f"settings: those that {run / 'resolved.json'} kept" in found.text
    before = next(line["loss"] for line in metrics(run) if line["step"] == step - 1)
    assert metrics(run / "debug")[0]["loss"] == pytest.approx(before, abs=1e-5)
    assert told.count("odd.jsonl:") == 1
    assert "There lies odd.jsonl:57.\n" in told
    if kind == "value":
        [(rank, [micro_batch])] = skipped["micro_batches"].items()
        assert told.startswith(f"ds_trainer: step {step}, rank {rank}, micro-batch {micro_batch}: the first output that is ")
        assert "is that of base_model.model.model.layers.1.mlp (LlamaMLP). What it was given is finite." in told
        assert f"row 0 (rank {rank}, micro-batch {micro_batch}): " in found.text
        odd.write_text("\n".join(lines[:-1]) + "\n")
        changed = forks.run(Command(replay, **here))
        assert changed.codes == [3]
        assert "the data has changed since the run (fingerprint " in changed.text
    else:
        assert skipped["micro_batches"] == {}
        assert "the gradient that arrives at the output of base_model.model.model.layers.1.mlp.down_proj is not: " in told
        anomaly = forks.run(Command([*replay, "--anomaly", "--no-nan-hooks", "--rows", "0"], **here))
        assert anomaly.codes == [6]
        assert "returned nan values in its 0th output. The forward line:\n" in anomaly.text
        assert re.search(r"modeling_llama\.py:\d+ in forward: down_proj = self\.down_proj", anomaly.text)
        well = forks.run(Command(["debug", "--replay", str(run), "--rows", "0"]))
        assert well.codes == [0], "without what spoils the model nothing fails"
        assert f"step {step} ran here without a failure. In the run it ended with: step {step}: every loss is" in well.text


def test_a_run_for_64_gpus_with_nvme_shows_what_rank_37_sees(forks, run_file, tmp_path):
    nvme = {"device": "nvme", "nvme_path": "/not/on/this/machine"}
    zero = {"stage": 3, "zero_hpz_partition_size": 8, "offload_optimizer": nvme, "offload_param": nvme}
    config = run_file(
        "run",
        data={"seq_len": 16},
        train={"global_batch_size": 64},
        deepspeed={"zero_optimization": zero, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
        monitor={"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "tracker")}},
    )
    begin = ["debug", "--config", str(config), "--rank", "37"]
    done = forks.run(Command([*begin, "--world-size", "64", "--step", "3"]))
    assert done.codes == [0], done.text
    assert done.text.count("LOWERED for this machine: deepspeed.zero_optimization.") == 3
    assert "offload_param.device=cpu, since /not/on/this/machine (" in done.text
    assert "engine: ZeRO-3, optimizer on cpu, param on cpu, fp32, optimizer torch_adamw, 1 x cpu started by debug" in done.text
    assert "as 64 ranks: 64 rows a step = 1 micro_batch_size x 1 gradient_accumulation_steps x 64 ranks" in done.text
    [line] = [json.loads(line) for line in (tmp_path / "run/debug/metrics.jsonl").read_text().splitlines()]
    assert (line["step"], line["rank"], line["micro_batch"]) == (3, 37, 1)
    assert line["share"] == pytest.approx(line["loss"] * line["targets"] / line["step_targets"])
    assert 5 < line["loss"] < 6.5
    assert not (tmp_path / "tracker").exists()
    refused = forks.run(Command([*begin, "--world-size", "63"]))
    assert refused.codes == [2]
    assert "train.global_batch_size = 64 is not a multiple of micro_batch_size 1 x 63 ranks = 63. Use 63 or 126" in refused.text


def test_a_checkpoint_goes_on_in_fp32_where_the_device_lacks_its_precision(forks, run_file, tmp_path):
    config = run_file("run", train={"precision": "bf16", "max_steps": 3}, checkpoint={"every_steps": 2, "keep_last": 2})
    done = forks.run(Command(["train", "--config", str(config)]))
    assert done.codes == [0], done.text
    begin = ["bf16", "debug", "--config", str(config), "--from", "step_00000002", "--rows", "0"]
    done = forks.run(Command(begin, script=str(WORKERS / "lacking.py")))
    assert done.codes == [0], done.text
    assert "LOWERED for this machine: train.precision=fp32, since it does not compute in bf16; losses agree" in done.text
    assert "engine: ZeRO-2, fp32" in done.text
    [of_debug], of_run = metrics(tmp_path / "run/debug"), metrics(tmp_path / "run")[2]
    assert of_debug["loss"] == pytest.approx(of_run["loss"], rel=2e-2)
    assert of_debug["loss"] != of_run["loss"]
