"""The batch file under a real SLURM of two hosts: asked to stop, it saves, goes back into the queue, and goes on to the end."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from helpers import ROOT, clean_environment, metrics, run_command, write_run
from hosts import Host, environment

SLURM = """ClusterName=test
SlurmctldHost=node1
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/run/slurmd
StateSaveLocation=/run/slurmctld
SlurmUser=root
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=node[1-2] CPUs=1 RealMemory=500
PartitionName=all Nodes=ALL Default=YES
"""
SECONDS = 120.0


@pytest.fixture
def slurm(make_hosts, tmp_path) -> tuple[list[Host], dict[str, str]]:
    """Two hosts that are a SLURM cluster, and the environment of a user of it."""
    if missing := [name for name in ("slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=environment()["PATH"])]:
        pytest.skip(f"not installed: {', '.join(missing)} (package slurm-wlm)")
    hosts = make_hosts(2)
    config = tmp_path / "slurm.conf"
    config.write_text(SLURM)
    for host in hosts:
        host.sh("mkdir -p /run/slurmd /run/slurmctld")
    hosts[0].sh(f"slurmctld -f {config} -L /run/slurmctld.log")
    for host in hosts:
        host.sh(f"slurmd -f {config} -L /run/slurmd.log")
    # SLURM_GPUS_ON_NODE is what a job with one GPU a node is told.
    fault = "training=sleep=0.3"
    return hosts, environment(SLURM_CONF=str(config), SLURM_GPUS_ON_NODE="1", CUDA_VISIBLE_DEVICES="", DS_TRAINER_FAULT=fault)


def test_the_batch_file_saves_requeues_and_goes_on(slurm, corpus, tmp_path):
    [node1, _], env = slurm
    config = write_run(corpus, tmp_path, train={"max_steps": 12}, checkpoint={"every_steps": 3})
    script = (ROOT / "scripts" / "slurm.sbatch").read_text()
    assert "#SBATCH --gpus-per-node=8\n" in script
    (tmp_path / "slurm.sbatch").write_text(script.replace("#SBATCH --gpus-per-node=8\n", ""))

    def type(*command: str) -> str:
        done = node1.run(*command, cwd=tmp_path, env=env)
        assert done.code == 0, done.text
        return done.out.strip()

    def state() -> str:
        log = tmp_path / f"slurm-{job}.out"
        assert time.monotonic() < end, type("squeue", "--long") + (log.read_text()[-3000:] if log.exists() else "no output")
        time.sleep(0.2)
        return type("squeue", "--noheader", "--job", job, "--states", "all", "--format", "%T %r")

    job = type("sbatch", "--parsable", "--mem", "100", "slurm.sbatch", config.name)
    end = time.monotonic() + SECONDS
    while not (tmp_path / "run" / "checkpoints" / "latest").exists():
        state()
    type("scancel", "--signal=USR1", job)
    while not state().startswith("PENDING"):
        pass
    ended = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (ended["code"], ended["reason"]) == (75, "stopped by SIGUSR1")
    # SLURM would wait for two minutes. At once is too soon: slurmd has revoked the credentials of the second of the requeue.
    type("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    while not state().startswith("COMPLETED"):
        pass
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["world_size"] for event in events if event["event"] == "started"] == [2, 2]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [ended["step"]]
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 13))


def test_a_wrong_run_file_ends_the_job_before_a_node_is_used(corpus, tmp_path):
    config = write_run(corpus, tmp_path, train={"max_stepz": 12})
    (tmp_path / "srun").write_text("#!/bin/sh\necho srun was called\n")
    (tmp_path / "srun").chmod(0o755)
    env = clean_environment(SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="1")
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = run_command(["bash", str(ROOT / "scripts" / "slurm.sbatch"), config.name], cwd=tmp_path, env=env)
    assert done.code != 0
    assert "max_stepz" in done.err
    assert "srun was called" not in done.text
