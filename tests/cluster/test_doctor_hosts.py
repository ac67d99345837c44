"""`ds_trainer doctor` on real hosts: each thing that is broken there is named right, also when many are broken together."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import ROOT, write_run
from hosts import Host, environment

MakeHosts = Callable[[int], list[Host]]


def doctor(here: Host, names: dict[str, int], *options: str, cwd: Path, **extra: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the answer of a doctor that is called on a host for some hosts with slots."""
    (cwd / "hostfile").write_text("".join(f"{name} slots={slots}\n" for name, slots in names.items()))
    words = ["ds_trainer", "doctor", "--hostfile", "hostfile", "--json", *options]
    done = here.run(*words, cwd=cwd, timeout=150, env=environment(**extra))
    assert "Traceback" not in done.err
    return done.code, json.loads(done.out)


def named(answer: dict[str, Any], verdict: str = "fail") -> dict[tuple[str, str], str]:
    """(check, host) -> what was found and how it is mended, of the findings with a verdict."""
    return {
        (each["check"], each["host"]): f"{each['found']} FIX {each['fix']}"
        for each in reversed(answer["findings"])
        if each["verdict"] == verdict
    }


def package(name: str) -> Path:
    """The folder that holds an installed package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def names_as_on_debian(*made: Host) -> None:
    """Let each host's own name resolve to 127.0.1.1."""
    for host in made:
        lines = [f"{'127.0.1.1' if each is host else each.address} {each.name}\n" for each in made]
        path = host.folder / f"{host.name}_hosts"
        path.write_text("127.0.0.1 localhost\n" + "".join(lines))
        host.mount(path, Path("/etc/hosts"))


def test_a_healthy_cluster_is_fit_and_its_collectives_are_timed(make_hosts: MakeHosts, corpus: Path, tmp_path: Path):
    here, other = make_hosts(2)
    config = write_run(corpus, tmp_path)
    for host in (here, other):
        host.sh("mount -t tmpfs -o size=2g tmpfs /dev/shm")  # a container may have less
    # Mended as doctor says.
    names_as_on_debian(here, other)
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nNCCL_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    command = ["ds_trainer", "doctor", "--hostfile", "hostfile", "--config", str(config)]
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    done = here.run(*command, cwd=tmp_path, timeout=150)
    assert done.code == 0, done.text
    assert done.out.startswith("FIT: 2 hosts with 2 slots, ")
    assert "FAIL" not in done.out
    warned = [line for line in done.out.splitlines() if line.startswith("warn ")]
    assert all(line.startswith("warn collectives") for line in warned), "but for a rank that is slow on a busy machine"
    assert "Collectives over 2 ranks (gloo)" in done.out
    assert "slowest rank: " in done.out
    rows = [line.split() for line in done.out.splitlines() if "MiB/s" in line or "GiB/s" in line]
    assert [row[0:2] for row in rows] == [["4", "KiB"], ["1", "MiB"], ["16", "MiB"]]
    assert all(len(row) == 8 for row in rows), "three collectives, each with its unit"
    assert "running collectives over 2 ranks" in done.err
    assert not (tmp_path / "run").exists(), "what was written for a test is gone"


def test_every_host_that_cannot_be_reached_says_why(make_hosts: MakeHosts, tmp_path: Path):
    here, stopped, refused, unknown, changed, hangs, without_python, without_folder = made = make_hosts(8)
    stopped.stop_sshd()
    for host, settings in {refused: "AuthorizedKeysFile none", hangs: "ForceCommand sleep 60"}.items():
        host.stop_sshd()
        host.start_sshd(settings)
    known = here.folder / "known_hosts"
    lines = {line.partition(",")[0]: line for line in known.read_text().splitlines()}
    lines[changed.name] = f"{changed.name} {lines[here.name].partition(' ')[2]}"
    del lines[unknown.name]
    known.write_text("\n".join(lines.values()) + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    without_python.mount(empty, Path(sys.executable).parent)
    work = tmp_path / "project" / "work"
    work.mkdir(parents=True)
    without_folder.sh(f"mount -t tmpfs tmpfs {work.parent}")

    names = {**{host.name: 1 for host in made}, "nowhere": 1}
    code, answer = doctor(here, names, "--timeout", "8", cwd=work)
    assert code == 2
    expected = {
        ("ssh", stopped.name): ("Connection refused", "systemctl start ssh"),
        ("ssh", refused.name): ("Permission denied", f"ssh-copy-id {refused.name}"),
        ("ssh", unknown.name): ("Host key verification failed", f"ssh-keyscan {unknown.name}"),
        ("ssh", changed.name): ("Host key for node5 has changed", f"ssh-keygen -R {changed.name}"),
        ("ssh", hangs.name): ("no answer within 8 s", f"`ssh {hangs.name} true` must end by itself"),
        ("ssh", "nowhere"): ("Could not resolve hostname nowhere", "Host nowhere, HostName ADDRESS"),
        ("python", without_python.name): ("no python at", "rsync -a"),
        ("python", without_folder.name): (f"no folder {work}", f"rsync -a {work}/ {without_folder.name}:{work}/"),
    }
    found = named(answer)
    assert found.keys() == expected.keys()
    for key, (what, fix) in expected.items():
        assert what in found[key].partition(" FIX ")[0], key
        assert fix in found[key].partition(" FIX ")[2], key
    assert answer["verdict"].startswith(f"NOT FIT: ssh on {stopped.name}: ssh: connect to host")
    assert any(each["check"] == "collectives" and each["verdict"] == "skip" for each in answer["findings"])


def test_what_is_broken_on_a_host_is_named_together(make_hosts: MakeHosts, corpus: Path, tmp_path: Path):
    here, other = make_hosts(2)
    data = tmp_path / "data" / "texts.jsonl"
    data.parent.mkdir()
    shutil.copy(corpus / "texts.jsonl", data)
    config = write_run(
        corpus,
        tmp_path,
        data={"sources": [{"path": str(data), "format": "text"}]},
        train={"global_batch_size": 65},  # a row for each of the 65 slots below
        deepspeed={"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        checkpoint={"folder": str(tmp_path / "disk" / "run")},
    )
    (tmp_path / "disk").mkdir()
    for name in ("empty", "ops"):
        (tmp_path / name).mkdir()
    # What is installed, and ds_trainer itself.
    metadata = next(package("deepspeed").parent.glob("deepspeed-*.dist-info")) / "METADATA"
    (tmp_path / "METADATA").write_text(metadata.read_text().replace("\nVersion: ", "\nVersion: 9.", 1))
    other.mount(tmp_path / "METADATA", metadata)
    (tmp_path / "loop.py").write_text("# another loop\n")
    other.mount(tmp_path / "loop.py", ROOT / "ds_trainer" / "loop.py")
    # Files, disks and limits.
    other.mount(tmp_path / "empty", corpus / "tokenizer")
    other.mount(tmp_path / "empty", data.parent)
    other.sh(f"mount -t tmpfs -o size=300k tmpfs {tmp_path / 'disk'}; mount -t tmpfs -o size=64m tmpfs /dev/shm")
    names_as_on_debian(here, other)
    other.stop_sshd()
    other.start_sshd(limits="ulimit -n 256")
    other.sh("ip rule add dport 29500 unreachable")
    # A build that was killed, no compiler on the other host, no pdsh here, and another program at the rendezvous.
    lock = tmp_path / "ops" / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    other.sh(f"mount -t tmpfs tmpfs {tmp_path / 'ops'}")
    for command in ("c++", "g++"):
        other.sh(f"for each in $(which -a {command}); do mount --bind /dev/null $each; done")
    here.sh("for each in $(which -a pdsh); do mount --bind /dev/null $each; done")
    listen = "import socket, time; box = socket.create_server(('', 29500)); time.sleep(60)"
    here.sh(f'{sys.executable} -c "{listen}" > /dev/null 2>&1 & sleep 0.3')
    (tmp_path / ".deepspeed_env").write_text(f"TORCH_EXTENSIONS_DIR={tmp_path / 'ops'}\n\n# a comment\nTOKEN=$(id)\n")

    code, answer = doctor(
        here,
        {here.name: 1, other.name: 64},
        "--config",
        str(config),
        cwd=tmp_path,
        HF_HOME="/data/hf",
        HF_TOKEN="hf_secret",
        RANK="0",
        TORCH_EXTENSIONS_DIR=str(tmp_path / "ops"),
    )
    assert code == 2
    assert "hf_secret" not in json.dumps(answer)
    version = metadata.parent.name.removeprefix("deepspeed-").removesuffix(".dist-info")
    failures = {
        ("pdsh", "here"): ("not installed", "apt-get install pdsh"),
        ("deepspeed_env", "here"): (".deepspeed_env:2: blank", "sed -i -E"),
        ("variables", here.name): ("HF_HOME of this shell is lost", 'echo "HF_HOME=$HF_HOME" >> ~/.deepspeed_env'),
        ("variables", other.name): ("HF_HOME of this shell is lost", 'echo "HF_HOME=$HF_HOME" >> ~/.deepspeed_env'),
        ("versions", other.name): (f"deepspeed 9.{version}, elsewhere {version}", f"pip install deepspeed=={version}"),
        ("code", other.name): ("1 file of", f"{other.name}:{ROOT / 'ds_trainer'}/"),
        ("limits", other.name): ("256 open files", "nofile 65536"),
        ("network", other.name): (
            f"{here.address}:29500, where the ranks meet, is not reached: Network is unreach",
            "open TCP ports",
        ),
        ("name", here.name): ("its own name resolves to 127.0.1.1", "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"),
        ("name", other.name): ("resolves to 127.0.1.1", "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"),
        ("port", here.name): ("port 29500 is taken by process", "--master_port 29501"),
        ("paths", other.name): (f"model.tokenizer: {corpus / 'tokenizer'} holds something else", other.name),
        ("run_folder", other.name): ("is not shared: what node1 wrote there is not seen (tmpfs on tmpfs)", "all hosts mount"),
        ("disk", other.name): ("0.29 MiB free", "larger disk"),
        ("ops", other.name): ("needs a C++ compiler", "apt-get install g++"),
    }
    warnings = {
        ("leftovers", "here"): ("RANK in the shell", "unset RANK"),
        ("devices", other.name): ("slots=64 on", "slots="),
        ("shm", other.name): ("/dev/shm has 64.00 MiB free of 64.00 MiB", "--shm-size"),
        ("ops", here.name): ("a build that was killed 0 min ago left a lock behind", f"rm {lock}"),
    }
    for verdict, expected in (("fail", failures), ("warn", warnings)):
        found = named(answer, verdict)
        for key, (what, fix) in expected.items():
            assert key in found, (key, found)
            assert what in found[key].partition(" FIX ")[0], found[key]
            assert fix in found[key].partition(" FIX ")[2], found[key]
    assert named(answer).keys() == failures.keys(), "and nothing else is called broken"
    missing = [each for each in answer["findings"] if each["check"] == "paths" and "data.sources" in each["found"]]
    assert [(each["host"], each["found"]) for each in missing] == [(other.name, f"data.sources: {data} is not there")]
    lines = [each["found"] for each in answer["findings"] if each["check"] == "deepspeed_env"]
    assert ["a comment" in line or "blank" in line or "'$'" in line for line in lines] == [True] * 3
    tokens = [each["fix"] for each in answer["findings"] if "HF_TOKEN" in each["found"]]
    assert tokens, "a secret that is lost is named"
    assert all("hf auth login" in fix for fix in tokens)
    assert lock.exists()
    assert not list((tmp_path / "disk").iterdir()), "what was written for a test is gone"


def test_hosts_that_do_not_reach_one_another_are_told_apart(make_hosts: MakeHosts, tmp_path: Path):
    here, second, third = make_hosts(3)
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    third.mount(tmp_path / "torch.py", package("torch") / "__init__.py")
    second.sh(f"ip route add blackhole {third.address}")
    # As on hosts with docker, the first address of the first host is one that leads nowhere.
    here.sh(f"ip addr flush dev eth0; ip addr add 172.17.0.1/16 dev eth0; ip addr add {here.address}/24 dev eth0")
    assert here.sh("hostname -I").split()[0] == "172.17.0.1"
    code, answer = doctor(here, dict.fromkeys([here.name, second.name, third.name], 1), cwd=tmp_path)
    assert code == 2
    found = named(answer)
    for host in (second, third):
        meets = [each for each in answer["findings"] if each["host"] == host.name and "where the ranks meet" in each["found"]]
        assert [each["fix"] for each in meets] == [f"deepspeed --master_addr {here.address}"]
        assert meets[0]["found"].startswith("172.17.0.1:29500")
    blocked = [each["found"] for each in answer["findings"] if "at none of its addresses" in each["found"]]
    assert any(f"reaches {third.name} at none of its addresses ({third.address}: " in each for each in blocked)
    assert "torch cannot be imported: no word, exit code -11 (killed by signal 11)" in found["torch", third.name]
    assert {check for check, _ in found} == {"network", "torch"}, "the names of the hosts are all right"

    # torchrun is given a name, which the third host does not know.
    (tmp_path / "nobody").write_text(f"127.0.0.1 localhost\n{third.address} {third.name}\n")
    third.mount(tmp_path / "nobody", Path("/etc/hosts"))
    _, answer = doctor(here, {here.name: 1, third.name: 1}, "--launcher", "torchrun", cwd=tmp_path, HF_HOME="/hf")
    found = named(answer)
    assert {check for check, _ in found} == {"network", "torch"}, "torchrun loses no HF_HOME"
    assert f"{here.name}:29500, where the ranks meet, is not reached: " in found["network", third.name]
    assert f"FIX torchrun --rdzv-endpoint {here.address}:29500" in found["network", third.name]
