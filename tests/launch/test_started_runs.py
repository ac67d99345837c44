"""The same run under every launcher, what it leaves behind, what the terminal shows, and the model that comes out."""

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import time

import pytest
import torch
from forks import Command, run_all
from helpers import clean_environment, free_port, metrics, run_command, torchrun, write_base

pytestmark = pytest.mark.launch

ZERO3 = ["deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]
NOISE = ("[INFO]", "Warning:", "huggingface/tokenizers", "Traceback", "gcc ", "[Gloo]", "Loading weights")


def own_lines(text: str) -> list[str]:
    """What the program said, without the launchers' own lines."""
    launchers = ("[20", "W1", "E1", "I1", "***", "Setting OMP_NUM_THREADS")
    return [line for line in text.splitlines() if line.strip() and not line.startswith(launchers)]


def on_a_terminal(arguments: list[str], cwd, timeout: float = 120) -> tuple[int, str]:
    """Run a command on a terminal of 100 columns; the exit code and what it showed."""
    ours, theirs = pty.openpty()
    environment = clean_environment(COLUMNS="100", LINES="30", TERM="xterm-256color")
    process = subprocess.Popen(
        arguments, cwd=cwd, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    shown, end = b"", time.monotonic() + timeout
    while time.monotonic() < end:
        if not select.select([ours], [], [], 0.5)[0]:
            continue
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the last process has closed the terminal
            break
        shown += piece
    else:
        os.killpg(process.pid, signal.SIGKILL)
    os.close(ours)
    return process.wait(timeout=30), shown.decode(errors="replace")


def test_both_launchers_and_debug_train_the_same_and_leave_a_whole_run_folder(run_file, corpus, tmp_path):
    held_out = {"sources": [{"path": str(corpus / "texts.jsonl"), "format": "text"}], "every_steps": 2, "max_rows": 8}
    config = run_file("two", evaluate=held_out, checkpoint={"every_steps": 2, "keep_last": 1})
    arguments = ["train", "--config", config.name]
    two = run_command(torchrun(2, "-m", "ds_trainer", *arguments), cwd=tmp_path)
    port = ["--master_port", str(free_port())]
    three_arguments = [*arguments, *ZERO3, f"checkpoint.folder={tmp_path / 'three'}"]
    three = run_command(["deepspeed", "--num_gpus", "2", *port, "--module", "ds_trainer", *three_arguments], cwd=tmp_path)
    one = run_command(["ds_trainer", "debug", "--config", config.name, "--steps", "4", "--rows", "1"], cwd=tmp_path)
    for done in (two, three, one):
        assert done.code == 0, done.text

    losses = [[line["loss"] for line in metrics(tmp_path / each)] for each in ("two", "three", "two/debug")]
    assert len(losses[0]) == 4
    assert losses[0][0] > losses[0][-1]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)

    for done in (two, three, one):
        lines = own_lines(done.text)
        assert not [line for line in lines if any(noise in line for noise in NOISE)], done.text
        assert not any("\x1b" in line or "\r" in line for line in lines), "colours and bars belong on a terminal"
        assert sum("tokenising" in line for line in lines) == (done is two), "rank zero shows the tokenising, once"
        assert sum(line.startswith("step 4/4  loss ") for line in lines) == 1
    assert "ZeRO-2, fp32, optimizer torch_adamw, 2 x cpu started by torchrun" in two.out
    assert "ZeRO-3, fp32, optimizer torch_adamw, 2 x cpu started by deepspeed" in three.out
    assert "batch: 4 rows a step = 1 micro_batch_size x 4 gradient_accumulation_steps x 1 ranks" in one.out
    assert "row 0: 48 tokens, 47 trained" in one.out
    assert "nothing was saved" in one.out

    run = tmp_path / "two"
    found = sorted(str(path.relative_to(run)) for path in run.rglob("*") if "debug" not in path.parts)
    asked, told = "run.yaml deepspeed.json resolved.json environment.json", "metrics.jsonl events.jsonl exit.json"
    assert [each for each in found if "/" not in each] == sorted(f".lock {asked} {told} logs errors checkpoints".split())
    assert {"logs/rank_00000.log", "logs/rank_00001.log", "checkpoints/latest"} < set(found)
    assert [each for each in found if each.startswith("checkpoints/step_") and each.count("/") == 1] == [
        "checkpoints/step_00000004"
    ]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000004"
    assert not list((run / "errors").iterdir())
    assert (run / "run.yaml").read_text() == config.read_text()
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    assert json.loads((run / "environment.json").read_text())["launcher"] == "torchrun"
    resolved = (tmp_path / "three" / "resolved.json").read_text()
    assert f"{config.name}:" in resolved, "settings must name file and line"
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events == ["started_anew", "started", "saved", "saved", "ended"]
    ended = json.loads((tmp_path / "three" / "exit.json").read_text())
    assert (ended["code"], ended["step"], ended["reason"]) == (0, 4, "done")
    again = ["deepspeed", "--num_gpus", "2", *port, "--module", "ds_trainer", *three_arguments]
    assert shlex.split(ended["continue"]) == again, "as it was typed"
    assert "--local_rank" not in ended["continue"]


def test_lora_under_zero3_on_a_terminal_then_exported_as_adapter_and_merged(run_file, corpus, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_base(corpus, tmp_path / "base")
    config = run_file(
        "sft",
        model={"path": "base"},
        adapter={"lora": {"rank": 4, "alpha": 8}},
        data={"sources": [{"path": str(corpus / "talks.jsonl")}]},
        train={"stage": "sft", "max_steps": 12, "learning_rate": 0.05},
        monitor={"log_every_steps": 5},
        checkpoint={"folder": "sft"},
    )
    command = torchrun(2, "-m", "ds_trainer", "train", "--config", config.name, *ZERO3)
    code, shown = on_a_terminal(command, tmp_path)
    assert code == 0, shown
    assert "━━━" in shown, "a terminal gets a bar"
    assert "12/12" in shown
    assert "step  5/12  loss " in shown, "the losses stay on the screen above the bar"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor must come back"
    assert not [noise for noise in NOISE if noise in shown]

    export = ["export", "--run", "sft", "--to"]
    exported = {"adapter": Command([*export, "adapter"]), "model": Command([*export, "merged", "--merge"])}
    for kind, done in run_all(exported, tmp_path).items():
        assert done.codes == [0], done.text
        assert not [noise for noise in NOISE if noise in done.text]
        assert (
            f"the {kind} is in {exported[kind].arguments[4]}; its loss on 4 rows agrees with the training engine's" in done.text
        )
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2, "A and B of seven linear layers in two blocks"
    assert all(tensor.numel() and tensor.abs().sum() > 0 for tensor in adapter.values())
    merged, base = (AutoModelForCausalLM.from_pretrained(tmp_path / each, dtype=torch.float32) for each in ("merged", "base"))
    changed = merged.model.layers[0].self_attn.q_proj.weight - base.model.layers[0].self_attn.q_proj.weight
    name = next(each for each in adapter if "layers.0.self_attn.q_proj.lora_A" in each)
    product = adapter[name.replace("lora_A", "lora_B")] @ adapter[name] * (8 / 4)
    assert torch.allclose(changed, product, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    question = [{"role": "user", "content": "say model"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert merged.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
