"""The command that is printed fits what is seen, and both launchers read it as it is meant."""

from __future__ import annotations

import argparse
import shlex
import subprocess

import pytest

from ds_trainer.cli import main
from ds_trainer.errors import RefusedError
from ds_trainer.launch import choose
from ds_trainer.launch.choose import choose_command
from ds_trainer.launch.commands import Commands, for_remote_shell

TRAIN = Commands(arguments=("train", "--config", "run.yaml", "model.path=a b"), device_count=4)
AWKWARD = (
    "a b",
    "$HOME",
    "a $HOME b",
    "`id`",
    "a `id` b",
    "[{path: x.jsonl}]",
    "[x]*",
    'say "x"',
    "it's",
    "a\\b",
    "a \\ b",
    "",
    "x;y&z",
)


@pytest.fixture
def hostfile(tmp_path):
    def write(text):
        path = tmp_path / "my hosts"
        path.write_text(text)
        return path

    return write


def test_the_devices_of_this_machine_are_used_where_nothing_else_is_seen():
    choice = choose_command(TRAIN, {})
    assert choice.commands == ("torchrun --nproc-per-node 4 -m ds_trainer train --config run.yaml 'model.path=a b'",)
    assert (choice.seen, choice.world_size) == ("this machine with 4 GPUs", 4)
    assert choose_command(TRAIN, {}, launcher="deepspeed").commands[0].startswith("deepspeed --num_gpus 4 --module ds_trainer ")
    without = choose_command(Commands(device_count=0), {})
    assert (without.seen, without.world_size) == ("this machine with no GPUs: 2 processes on the CPU, as an example", 2)


def test_a_hostfile_is_handed_to_deepspeed(hostfile, monkeypatch):
    monkeypatch.setattr(choose.shutil, "which", lambda name: f"/usr/bin/{name}")
    choice = choose_command(TRAIN, {"SLURM_JOB_NUM_NODES": "9"}, hostfile=hostfile("node1 slots=8\nnode2 slots=4\n"))
    words = shlex.split(choice.commands[0])
    assert words[:6] == ["deepspeed", "--hostfile", str(hostfile("node1 slots=8\n")), "--module", "ds_trainer", "train"]
    assert choice.world_size == 12
    assert choice.seen.startswith("2 hosts in ")
    assert choice.seen.endswith(" with 12 processes in all")


def test_without_pdsh_several_hosts_are_refused_and_one_is_not(hostfile, monkeypatch):
    monkeypatch.setattr(choose.shutil, "which", lambda name: None)
    with pytest.raises(RefusedError, match="apt-get install pdsh"):
        choose_command(TRAIN, {}, hostfile=hostfile("node1 slots=8\nnode2 slots=4\n"))
    assert "model.path=a b" in shlex.split(choose_command(TRAIN, {}, hostfile=hostfile("node1 slots=8\n")).commands[0])


def test_torchrun_on_the_hosts_of_a_hostfile_is_one_command_where_they_are_alike(hostfile):
    alike = choose_command(TRAIN, {}, hostfile=hostfile("a slots=8\nb slots=8\n"), launcher="torchrun")
    nodes = "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:29500 --nproc-per-node"
    assert alike.commands == (f"{nodes} 8 -m ds_trainer train --config run.yaml 'model.path=a b'",)
    assert alike.where == "on every host: a, b"
    unlike = choose_command(TRAIN, {}, hostfile=hostfile("a slots=8\nb slots=4\n"), launcher="torchrun")
    assert [line.partition(" -m ")[0] for line in unlike.commands] == [f"{nodes} 8", f"{nodes} 4"]
    assert [line.partition("#")[2] for line in unlike.commands] == [" on a", " on b"]


def test_in_a_slurm_job_srun_starts_a_torchrun_a_node():
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "8"}
    choice = choose_command(TRAIN, job)
    assert choice.commands[0].startswith("srun ")
    assert "--nproc-per-node 8 -m ds_trainer train" in choice.commands[0]
    assert (choice.seen, choice.world_size) == ("SLURM job 17 with 3 nodes, 8 GPUs on this one", 24)
    with pytest.raises(RefusedError, match="Leave out --launcher, or give --hostfile too"):
        choose_command(TRAIN, job, launcher="deepspeed")


@pytest.mark.parametrize(
    ("name", "value"),
    [("SLURM_JOB_NUM_NODES", each) for each in ("abc", "0", "-1", "1.5", "9" * 20)]
    + [("SLURM_GPUS_ON_NODE", each) for each in ("abc", "0", "-3", "99999999")],
)
def test_a_slurm_variable_that_is_no_count_is_refused_by_name(name, value):
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "3", name: value}
    with pytest.raises(RefusedError, match=f"{name} = {value}: .* unset {name}"):
        choose_command(TRAIN, job)


def test_a_job_without_a_number_of_nodes_is_not_guessed_at_and_without_gpus_the_cpu_is_an_example():
    with pytest.raises(RefusedError, match="SLURM_JOB_NUM_NODES is not set"):
        choose_command(TRAIN, {"SLURM_JOB_ID": "17"})
    cpu = choose_command(Commands(device_count=0), {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2"})
    assert (cpu.seen, cpu.world_size) == (
        "SLURM job 17 with 2 nodes, no GPUs: 2 processes on the CPU of each, as an example",
        4,
    )


@pytest.mark.parametrize("word", AWKWARD)
def test_a_word_passes_deepspeed_and_the_remote_shell_of_pdsh_unchanged(word):
    """DeepSpeed's own handling of a word, then a shell as ssh starts it."""
    launchers = pytest.importorskip("deepspeed.launcher.multinode_runner")
    pdsh = launchers.PDSHRunner.__new__(launchers.PDSHRunner)
    pdsh.args = argparse.Namespace(user_args=[for_remote_shell(word)])
    script = " ".join(["printf %s", *pdsh.parse_user_args()])
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=10).stdout == word


PYTHON = "/v/bin/python"


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        (f"{PYTHON} /v/bin/torchrun --nnodes 2 --max-restarts 3 -m", "torchrun --nnodes 2 --max-restarts 3 -m"),
        (f"{PYTHON} /v/bin/deepspeed --master_port 7 --module", "deepspeed --master_port 7 --module"),
        (f"{PYTHON} -m torch.distributed.run --nnodes 2 -m", f"{PYTHON} -m torch.distributed.run --nnodes 2 -m"),
    ],
)
def test_the_command_that_goes_on_is_the_launcher_s_own(launcher, expected):
    again = TRAIN.again([*launcher.split(), "ds_trainer", "train", "old"])
    assert again == f"{expected} ds_trainer train --config run.yaml 'model.path=a b'"


@pytest.mark.parametrize(
    "launcher", ["", "torchrun", f"{PYTHON} torchrun train.py ds_trainer", "torchrun --no-python ds_trainer"]
)
def test_a_launcher_that_was_given_no_module_is_not_guessed_at(launcher):
    assert TRAIN.again(launcher.split()) is None


def test_the_command_alone_goes_to_standard_output(run_file, hostfile, capsys, monkeypatch):
    monkeypatch.setattr(choose.shutil, "which", lambda name: f"/usr/bin/{name}")
    config, hosts = str(run_file()), str(hostfile("node1 slots=1\nnode2 slots=1\n"))
    command = ["launch-command", "--config", config, "--hostfile", hosts]
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--set", "train.seed=3", "train.max_steps=9"])
    out, err = capsys.readouterr()
    words = ["deepspeed", "--hostfile", hosts, "--module", "ds_trainer", "train", "--config", config]
    assert shlex.split(out) == [*words, "train.max_steps=9", "--set", "train.seed=3"]
    assert "# batch: 4 rows a step = 1 micro_batch_size x 2 gradient_accumulation_steps x 2 ranks" in err.splitlines()
    hostfile("node1 slots=3\n")
    assert main(command) == 2
    assert "3" in capsys.readouterr().err
    hostfile("node1\n")
    assert main(command) == 2
    assert "my hosts:1: how many processes run on node1?" in capsys.readouterr().err
