"""Formulas, the run folder's small files, and a terminal that stays quiet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_trainer.errors import RefusedError
from ds_trainer.monitor.metrics import ModelFlops, clock, model_flops, peak_flops, perplexity, quantity, uncounted
from ds_trainer.monitor.recorder import Speed
from ds_trainer.monitor.run_folder import RunFolder


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (99, "99 s"), (130, "2 min"), (5940, "99 min"), (11100, "3 h 05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(812, "812"), (4100, "4.1k"), (13_200_000, "13.2M"), (1.02e9, "1.02B")])
def test_quantity(number, text):
    assert quantity(number) == text


def test_perplexity_of_a_hopeless_loss_is_infinite():
    assert perplexity(0) == 1
    assert perplexity(1e6) == float("inf")


def test_a_folder_that_cannot_be_made_is_refused_with_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RefusedError, match=r"checkpoint\.folder = .*file/run: cannot be written"):
        RunFolder(tmp_path / "file" / "run", 0).create()


def test_the_first_failing_rank_is_marked_once(tmp_path):
    first, second = RunFolder(tmp_path, 3), RunFolder(tmp_path, 1)
    first.create()
    assert first.record_error(ValueError("bad")) is True
    assert second.record_error(ConnectionError("because of it")) is False
    assert (tmp_path / "errors/first_failure.txt").read_text() == "rank_00003.txt\n"
    assert "ValueError: bad" in (tmp_path / "errors/rank_00003.txt").read_text()
    assert (tmp_path / "errors/rank_00001.txt").exists()
    second.forget_last_end()
    assert list((tmp_path / "errors").iterdir()) == []


def test_lines_are_appended_and_files_replaced(tmp_path):
    folder = RunFolder(tmp_path, 0)
    folder.metric({"step": 1})
    folder.metric({"step": 2})
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]
    folder.write_json("exit.json", {"code": 1})
    folder.write_json("exit.json", {"code": 0})
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 0}
    assert not list(tmp_path.glob(".*"))


def test_a_second_start_in_the_same_folder_is_refused_while_the_first_lives(tmp_path):
    first, second = RunFolder(tmp_path, 0), RunFolder(tmp_path, 0)
    first.lock()
    with pytest.raises(RefusedError, match=rf"another start is training in it \(process {os.getpid()} on .*-2"):
        second.lock()
    first._lock.close()  # what the kernel does when the process ends
    second.lock()


NOISY = """
import logging, os, sys, warnings
from pathlib import Path
from ds_trainer.monitor import logs
console = logs.terminal()
logs.to_log_file(Path(sys.argv[1]))
print("printed"); warnings.warn("warned"); logging.getLogger("deepspeed").info("logged")
os.system("echo from a child"); sys.stderr.write("to stderr\\n")
console.print("for the user")
"""


def test_only_our_own_console_reaches_the_terminal(tmp_path):
    log = tmp_path / "logs" / "rank_00000.log"
    done = subprocess.run(
        [sys.executable, "-c", NOISY, str(log)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout == "for the user\n"
    assert done.stderr == ""
    text = log.read_text()
    assert all(words in text for words in ("printed", "warned", "logged", "from a child", "to stderr"))


def test_operations_of_a_small_model_by_hand():
    config = SimpleNamespace(hidden_size=8, num_attention_heads=2, num_hidden_layers=3, head_dim=6)
    config.get_text_config = lambda: config
    weights = [("model.embed_tokens.weight", 1000, True), ("layer.weight", 50, True), ("frozen.weight", 30, False)]
    flops = model_flops([*weights, ("lm_head.weight", 1000, True)], config)
    assert flops == ModelFlops(per_token=6 * 50 + 4 * 30 + 6 * 1000, per_pair=12 * 3 * 2 * 6)
    assert model_flops(weights, config) == flops  # the embedding is the head too, and multiplied
    assert flops.of(tokens=2, pairs=3) == 2 * flops.per_token + 3 * flops.per_pair


def test_of_a_mixture_only_the_experts_count_that_a_token_is_sent_to():
    config = SimpleNamespace(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=1
    )
    config.get_text_config = lambda: config
    weights = [
        ("layers.0.mlp.experts.down_proj", 400, True),
        ("layers.0.mlp.gate.weight", 10, True),
        ("lm_head.weight", 5, True),
    ]
    assert model_flops(weights, config).per_token == 6 * (400 / 4 + 10 + 5)


def test_what_is_not_counted_is_named():
    def config(**fields):
        found = SimpleNamespace(num_attention_heads=2, model_type="odd", **fields)
        found.get_text_config = lambda: found
        return found

    assert uncounted(config(), 4096) is None
    assert uncounted(config(sliding_window=4096), 4096) is None
    assert uncounted(config(sliding_window=4095), 4096) == "attention in a window of 4095 tokens"
    assert uncounted(config(sliding_window=512, layer_types=["full_attention"]), 4096) is None
    assert uncounted(config(sliding_window=512, layer_types=["full_attention", "sliding_attention"]), 4096) is not None
    assert uncounted(config(layer_types=["full_attention", "linear_attention"]), 8) == "layers of type linear_attention"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A10G", None),  # not an A10
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_the_peak_goes_by_the_words_of_a_device_s_name(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


def test_utilization_is_a_share_of_the_peak_of_all_ranks():
    speed = Speed(ModelFlops(per_token=10.0, per_pair=1.0), peak_flops=100.0)
    assert speed.fields(tokens=30, pairs=100, seconds=2.0, ranks=4) == {"tflops_per_rank": 50.0 / 1e12, "mfu": 0.5}
    assert Speed().fields(1, 1, 1.0, 1) == {"tflops_per_rank": None, "mfu": None}
