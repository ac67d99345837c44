"""Real launchers over real ssh on several hosts: they train as one host does, and lose nothing when a rank or a host dies."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import metrics, run_command, torchrun, write_run
from hosts import Host, environment

STEPS = 10
SLOW = "training=sleep=0.3"
"""At every step of every rank, so that there is time to kill it."""
THREE_HOSTS = ["deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Loss by step of a run of two ranks on one host that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    config = run_file(corpus, folder)
    done = run_command(torchrun(2, "-m", "ds_trainer", "train", "--config", config.name), cwd=folder)
    assert done.code == 0, done.text
    return losses(folder)


def run_file(corpus: Path, folder: Path) -> Path:
    """A run that is saved after each step, in a folder named `run`."""
    return write_run(
        corpus,
        folder,
        train={"max_steps": STEPS, "global_batch_size": 6, "hang_timeout_seconds": 20, "collective_timeout_seconds": 30},
        checkpoint={"every_steps": 1, "keep_last": 3},
    )


def losses(folder: Path) -> dict[int, float]:
    """Loss by step. A step that was done twice must have come out the same."""
    found: dict[int, float] = {}
    for line in metrics(folder / "run"):
        assert found.setdefault(line["step"], line["loss"]) == pytest.approx(line["loss"], abs=1e-6)
    return found


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def ended(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "exit.json").read_text())


class Typed:
    """A command that was typed at a host and goes on; what it prints is kept."""

    def __init__(self, host: Host, cwd: Path, *command: str, **variables: str) -> None:
        self.file = cwd / f"terminal_{host.name}_{time.monotonic_ns()}.txt"
        with self.file.open("w") as out:
            typed = host.inside("env", "--chdir", str(cwd), *command)
            env = environment(**variables)
            self.process = subprocess.Popen(typed, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    @property
    def text(self) -> str:
        return self.file.read_text(errors="replace")[-6000:]

    def wait(self, seconds: float = 90) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not within {seconds} s\n{self.text}")

    def wait_for_steps(self, folder: Path, number: int, seconds: float = 60) -> None:
        """Until the run has saved so many steps more than it has now."""
        latest = folder / "run" / "checkpoints" / "latest"

        def saved() -> int:
            return int(latest.read_text().removeprefix("step_")) if latest.exists() else 0

        goal, end = saved() + number, time.monotonic() + seconds
        while saved() < goal:
            assert time.monotonic() < end, self.text
            assert self.process.poll() is None, self.text
            time.sleep(0.05)


def wait_until_no_rank_is_left(*hosts: Host, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while left := [host.name for host in hosts if "-m ds_trainer" in host.sh("ps -eo args")]:
        assert time.monotonic() < end, left
        time.sleep(0.2)


def test_deepspeed_through_pdsh(make_hosts, corpus, tmp_path, straight):
    """Two hosts; asked to stop; a lost connection; then three hosts with ZeRO-3 to the end."""
    node1, node2, node3 = make_hosts(3)
    config = run_file(corpus, tmp_path)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    # pdsh hands on few variables: without these every rank would compute on all cores and look for GPUs.
    (tmp_path / ".deepspeed_env").write_text(f"OMP_NUM_THREADS=1\nCUDA_VISIBLE_DEVICES=\nDS_TRAINER_FAULT={SLOW}\n")
    awkward = tmp_path / "texts; $HOME.jsonl"  # the shells on the way must leave it alone
    awkward.symlink_to(corpus / "texts.jsonl")
    asked = ["--config", config.name, "--hostfile", hostfile.name, f"data.sources=[{{path: '{awkward}', format: text}}]"]
    chosen = node1.run("ds_trainer", "launch-command", *asked, cwd=tmp_path)
    assert chosen.code == 0, chosen.text
    command = chosen.out.strip()

    typed = Typed(node1, tmp_path, "bash", "-c", f"exec {command}")
    typed.wait_for_steps(tmp_path, 2)
    node1.sh("pkill -TERM -f bin/deepspeed")  # as a scheduler does
    typed.wait()
    wait_until_no_rank_is_left(node1, node2)
    assert (ended(tmp_path)["code"], ended(tmp_path)["reason"]) == (75, "stopped by SIGTERM"), typed.text
    goes_on = ended(tmp_path)["continue"]
    assert goes_on == command.replace("--hostfile hosts", "--hostfile HOSTFILE")

    typed = Typed(node1, tmp_path, "bash", "-c", goes_on.replace("HOSTFILE", "hosts"))
    typed.wait_for_steps(tmp_path, 2)
    node1.sh("pkill -KILL -f 'ssh .*-x node2 '")
    wait_until_no_rank_is_left(node1, node2)
    typed.wait()
    assert "the ssh session of the deepspeed command" in (tmp_path / "run" / "logs" / "rank_00001.log").read_text()
    assert ended(tmp_path)["code"] == 75, typed.text
    assert losses(tmp_path) == {step: straight[step] for step in losses(tmp_path)}, (
        "two hosts compute what one does, bit for bit"
    )

    hostfile.write_text("node1 slots=1\nnode2 slots=1\nnode3 slots=1\n")
    assert Typed(node3, tmp_path, "bash", "-c", " ".join([command, *THREE_HOSTS])).wait() == 0
    assert losses(tmp_path) == pytest.approx(straight, abs=1e-5)
    assert [event["world_size"] for event in events(tmp_path, "started")] == [2, 2, 3]
    assert ended(tmp_path)["reason"] == "done"
    wait_until_no_rank_is_left(node1, node2, node3)


def torchrun_on(host: Host, folder: Path, config: Path, nodes: str) -> Typed:
    options = (
        f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint node1:29500 --rdzv-conf last_call_timeout=5 --max-restarts 3"
    )
    train = f"--nproc-per-node 1 -m ds_trainer train --config {config.name}"
    return Typed(host, folder, "torchrun", *options.split(), *train.split(), CUDA_VISIBLE_DEVICES="", DS_TRAINER_FAULT=SLOW)


def test_torchrun_starts_all_ranks_again_after_one_was_killed(make_hosts, corpus, tmp_path, straight):
    hosts = make_hosts(2)
    config = run_file(corpus, tmp_path)
    both = [torchrun_on(host, tmp_path, config, "2") for host in hosts]
    both[0].wait_for_steps(tmp_path, 2)
    hosts[1].sh("pkill -KILL -f -- '-u -m ds_trainer'")
    assert [typed.wait() for typed in both] == [0, 0], both[0].text
    assert [event["world_size"] for event in events(tmp_path, "started")] == [2, 2]
    assert losses(tmp_path) == straight, "bit for bit"


def test_torchrun_goes_on_alone_after_the_other_host_died(make_hosts, corpus, tmp_path, straight):
    node1, node2 = make_hosts(2)
    config = run_file(corpus, tmp_path)
    first, second = (torchrun_on(host, tmp_path, config, "1:2") for host in (node1, node2))
    first.wait_for_steps(tmp_path, 2)
    node2.die()
    second.process.kill()
    assert first.wait() == 0, first.text
    assert [event["world_size"] for event in events(tmp_path, "started")] == [2, 1]
    assert losses(tmp_path) == pytest.approx(straight, abs=1e-5)
    wait_until_no_rank_is_left(node1)
