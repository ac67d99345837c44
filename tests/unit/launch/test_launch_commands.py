"""The commands that refusals offer are right, whole, and understood by the launchers themselves."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest

from ds_trainer.launch.commands import Commands, visible_devices

WHOLE = ("train", "--config", "my run.yaml", "--deepspeed", "ds.json", "--resume", "latest", "data.path=a b;rm")


def test_commands_keep_every_argument_and_quote_for_the_shell():
    commands = Commands(arguments=WHOLE, device_count=4)
    assert shlex.split(commands.torchrun()) == ["torchrun", "--nproc-per-node", "4", "-m", "ds_trainer", *WHOLE]
    assert shlex.split(commands.deepspeed()) == ["deepspeed", "--num_gpus", "4", "--module", "ds_trainer", *WHOLE]


def test_debug_command_keeps_the_settings_and_drops_what_only_train_knows():
    debug = shlex.split(Commands(arguments=WHOLE).debug())
    assert debug == ["ds_trainer", "debug", *WHOLE[1:5], "data.path=a b;rm"]


@pytest.mark.parametrize(
    ("arguments", "debug"),
    [
        (("train", "--config=run.yaml", "--set", "a.b=1", "--resume"), "--config=run.yaml --set a.b=1"),
        (("train", "--max-steps=3", "a.b=--x"), "a.b=--x"),
        (("train", "--config"), "--config"),
        (("train",), ""),
        ((), ""),
    ],
)
def test_debug_command_of_unusual_arguments(arguments, debug):
    assert Commands(arguments=arguments).debug() == f"ds_trainer debug {debug}".strip()


@pytest.mark.parametrize("local_rank", [("--local_rank=1",), ("--local-rank=1",), ("--local_rank", "1")])
def test_local_rank_added_by_a_launcher_is_not_repeated(local_rank):
    commands = Commands(arguments=(*local_rank, "train", "--config", "run.yaml"))
    assert commands.torchrun().endswith("-m ds_trainer train --config run.yaml")
    assert commands.debug() == "ds_trainer debug --config run.yaml"


def test_launcher_commands_say_train_also_when_debug_was_asked_for():
    assert Commands(arguments=("debug", "--config", "run.yaml")).torchrun().endswith("ds_trainer train --config run.yaml")


@pytest.mark.parametrize("device_count", [None, 0])
def test_without_a_gpu_the_commands_show_two_processes(device_count):
    assert "--nproc-per-node 2 " in Commands(device_count=device_count).torchrun()


def as_bash_reads_it(command: str, **environ: str) -> list[str]:
    """The arguments of the first program of the command, with SLURM's own programs replaced."""
    program = command.split()[0]
    script = f"scontrol() {{ printf 'node-a\\nnode-b\\n'; }}\n{program}() {{ printf '%s\\0' \"$@\"; }}\n{command}"
    result = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, timeout=30, env={**os.environ, **environ}
    )
    return result.stdout.split("\0")[:-1]


def test_torchrun_reads_its_commands_as_they_are_meant():
    torch_run = pytest.importorskip("torch.distributed.run")
    commands = Commands(arguments=WHOLE, device_count=4)
    srun = as_bash_reads_it(commands.srun(), SLURM_JOB_NUM_NODES="3", SLURM_JOB_NODELIST="node-[a-c]")
    assert srun[:3] == ["--ntasks=3", "--ntasks-per-node=1", "torchrun"]
    pods = {"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "29511"}
    local, in_job, in_pod = (
        torch_run.parse_args(arguments)
        for arguments in (as_bash_reads_it(commands.torchrun()), srun[3:], as_bash_reads_it(commands.pods(), **pods))
    )
    for parsed in (local, in_job, in_pod):
        assert (parsed.nproc_per_node, parsed.module, parsed.training_script) == ("4", True, "ds_trainer")
        assert parsed.training_script_args == list(WHOLE)
    assert (in_job.nnodes, in_job.rdzv_backend, in_job.rdzv_endpoint) == ("3", "c10d", "node-a:29500")
    assert (in_pod.nnodes, in_pod.node_rank, in_pod.master_addr, in_pod.master_port) == ("3", 1, "node-a", 29511)


def test_deepspeed_reads_its_command_as_it_is_meant():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    parsed = runner.parse_args(as_bash_reads_it(Commands(arguments=WHOLE, device_count=4).deepspeed()))
    assert (parsed.num_gpus, parsed.module, parsed.user_script) == (4, True, "ds_trainer")
    assert parsed.user_args == list(WHOLE)


@pytest.mark.parametrize(
    ("listed", "count"),
    [("", 0), ("-1", 0), ("NoDevFiles", 0), ("0", 1), ("0,1, 5", 3), ("0,-1,1", 1), ("GPU-8a2f,MIG-77/1/0", 2), ("1,,2", 1)],
)
def test_cuda_visible_devices_decides_and_ends_at_the_first_invalid_entry(listed, count, tmp_path):
    (tmp_path / "nvidia0").touch()
    assert visible_devices({"CUDA_VISIBLE_DEVICES": listed}, dev=tmp_path) == count


def test_device_files_are_counted_where_nothing_is_listed(tmp_path):
    for name in ["nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-caps", "null"]:
        (tmp_path / name).touch()
    assert visible_devices({}, dev=tmp_path) == 3
    assert visible_devices({}, dev=tmp_path / "missing") == 0
