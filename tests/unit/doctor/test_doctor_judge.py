"""Each broken set-up is named right: the check, the host, what was found, and a fix with the value that fits."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from ds_trainer.doctor.evidence import HERE, Evidence, HostEvidence
from ds_trainer.doctor.judge import CHECKS, judge
from ds_trainer.doctor.needs import Needs
from ds_trainer.launch.exports import Exports

GIB = 1 << 30
H100 = ["NVIDIA H100", 80 * GIB]

Break = Callable[[Evidence], Evidence]


def host(number: int) -> HostEvidence:
    """A host with two GPUs that has nothing wrong."""
    others = [other for other in (1, 2, 3) if other != number]
    facts = {
        "host_name": f"node{number}",
        "machine": [f"boot{number}", "net:[1]"],
        "folder": "/work",
        "python": "3.11.9",
        "executable": "/venv/bin/python",
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "peft": "0.21.2", "numpy": "2.4.6"},
        "driver": "570.86",
        "torch": {
            "version": "2.13.0",
            "cuda": "12.8",
            "usable": True,
            "devices": [H100, H100],
            "nccl": "2.27.3",
            "why_not": None,
        },
        "gpus": 2,
        "gpus_hidden": False,
        "cores": 64,
        "code": {"folder": "/work/ds_trainer", "files": {"loop.py": "a", "train.py": "b"}},
        "variables": {"HF_HOME": "1"},
        "leftovers": [],
        "interfaces": [
            {"name": "lo", "address": "127.0.0.1", "loopback": True},
            {"name": "eth0", "address": f"192.168.0.{number}", "loopback": False},
        ],
        "gloo_interface": None,
        "infiniband": False,
        "own_addresses": [f"192.168.0.{number}"],
        "first_address": f"192.168.0.{number}",
        "shm": {"free": 16 * GIB, "size": 16 * GIB},
        "limits": {"nofile": [65536, 65536], "memlock": [-1, -1]},
        "unlimited": -1,
        "port_owner": None,
    }
    return HostEvidence(
        name=f"node{number}",
        slots=2,
        facts=facts,
        clock=(0.001 * number, 0.002),
        reaches={f"node{other}": {f"192.168.0.{other}": "ok"} for other in others},
        rendezvous=None if number == 1 else "ok",
        paths={
            "/data/model": {"found": True, "files": 3, "bytes": 9000, "digest": "m"},
            "/data/x.jsonl": {"found": True, "files": 1, "bytes": 9000, "digest": "x"},
        },
        folder={"space": {"free": 100 * GIB, "size": 200 * GIB}, "checkpoints": 0, "file_system": "nfs4 on store:/out"},
        sees_first=True,
        ops=[
            {
                "op": "fused_adam",
                "folder": "/ops/fused_adam",
                "built": True,
                "lacks": None,
                "stale_lock_seconds": None,
                "compiler": "c++ 12.2.0",
                "nvcc": "12.8",
                "torch_cuda": "12.8",
            }
        ],
    )


HEALTHY = Evidence(
    hosts=(host(1), host(2), host(3)),
    pdsh="ssh,exec",
    matter={"HF_HOME": ("where models are found", "1")},
    exports=Exports(variables={"NCCL_DEBUG": "INFO"}),
    needs=Needs(
        paths={"/data/model": "model.path", "/data/x.jsonl": "data.sources"},
        hub_ids={},
        run_folder="/out/run",
        keep=3,
        ops={"cuda": ("fused_adam",), "cpu": ()},
        nvme=False,
    ),
    checkpoint=(10 * GIB, "894,784,853 trained parameters x 12 bytes"),
    collectives={
        "answer": {"alone": [1.0, 1.1, 0.9, 1.0, 1.2, 1.0], "wrong": [], "bandwidth": [], "device": "cuda"},
        "failed": [],
    },
)


def facts(**changed: Any) -> Break:
    """On node2, facts are otherwise; a name may go deeper, as in torch__nccl."""
    return facts_on("node2", **changed)


def facts_on(*hosts: str, **changed: Any) -> Break:
    def apply(evidence: Evidence) -> Evidence:
        new = []
        for each in evidence.hosts:
            if each.name in hosts:
                own = copy.deepcopy(each.facts)
                for name, value in changed.items():
                    *folders, last = name.split("__")
                    place: Any = own
                    for folder in folders:
                        place = place[folder]
                    place[last] = value
                each = replace(each, facts=own)
            new.append(each)
        return replace(evidence, hosts=tuple(new))

    return apply


def on(name: str, **fields: Any) -> Break:
    """A host's evidence is otherwise."""
    return lambda evidence: replace(
        evidence, hosts=tuple(replace(each, **fields) if each.name == name else each for each in evidence.hosts)
    )


def whole(**fields: Any) -> Break:
    """The evidence as a whole is otherwise."""
    return lambda evidence: replace(evidence, **fields)


def both(*breaks: Break) -> Break:
    def apply(evidence: Evidence) -> Evidence:
        for each in breaks:
            evidence = each(evidence)
        return evidence

    return apply


def slots(count: int) -> Break:
    """On node2, there are other slots."""
    return both(on("node2", slots=count), whole(collectives=None))


def paths(path: str, **answer: Any) -> Break:
    """On node2, a path is answered otherwise."""
    return on("node2", paths={**(HEALTHY.hosts[1].paths or {}), path: answer})


def op(**changed: Any) -> Break:
    """On node2, an op is otherwise."""
    return on("node2", ops=[{**HEALTHY.hosts[1].ops[0], **changed}])  # type: ignore[index]


def lost(reason: str) -> Break:
    return on("node2", lost=reason, facts=None, clock=None, paths=None, folder=None, ops=None, reaches={}, rendezvous=None)


@dataclass(frozen=True)
class Case:
    """A set-up that is broken in one place, and how that must be named."""

    broken: Break
    check: str
    found: str
    """A pattern."""
    fix: str
    """A pattern."""
    host: str = "node2"
    verdict: str = "fail"


MEASURED: dict[str, Any] = {"alone": [1.0] * 6, "wrong": [], "bandwidth": [], "device": "cuda"}
FAR = {"node1": {"192.168.0.1": "no answer"}, "node3": {"192.168.0.3": "ok"}}
SMALL = {"space": {"free": 25 * GIB, "size": 99 * GIB}, "checkpoints": 0, "file_system": "nfs4 on store:/out"}
OTHER_NAMES = [
    {"name": "docker0", "address": "172.17.0.1", "loopback": False},
    {"name": "ib0", "address": "192.168.0.2", "loopback": False},
]

BROKEN: dict[str, Case] = {
    "no such host": Case(
        lost("ssh: Could not resolve hostname node2: Name or service not known"),
        "ssh",
        "Could not resolve",
        "Host node2, HostName ADDRESS",
    ),
    "host is down": Case(
        lost("ssh: connect to host node2 port 22: Connection timed out"), "ssh", "timed out", "is the host up.* nc -vz node2 22"
    ),
    "asks for a password": Case(
        lost("me@node2: Permission denied (publickey,password)."),
        "ssh",
        r"Permission denied \(publickey,password\)",
        "ssh-copy-id node2",
    ),
    "host key unknown": Case(lost("Host key verification failed."), "ssh", "Host key", "ssh-keyscan node2 >>"),
    "host key changed": Case(
        lost("Host key for node2 has changed. Host key verification failed."), "ssh", "has changed", "ssh-keygen -R node2"
    ),
    "login hangs": Case(lost("no answer within 20 s"), "ssh", "within 20 s", "`ssh node2 true` must end by itself"),
    "no ssh here": Case(lost("ssh is not installed on this machine"), "ssh", "not installed", "openssh-client"),
    "anything else": Case(lost("bash: exec: Bad CPU type"), "ssh", "Bad CPU", "see what `ssh node2 true` says"),
    "no python": Case(
        lost("no python at /venv/bin/python"), "python", "no python at /venv/bin/python", "rsync -a /venv/ node2:/venv/"
    ),
    "no folder": Case(lost("no folder /work"), "python", "no folder /work", "rsync -a /work/ node2:/work/"),
    "a folder that needs quotes": Case(
        facts(folder="/my work"), "python", "`/my work` means something else to a shell", "mv '/my work' /my_work$"
    ),
    "one machine twice": Case(
        facts(machine=["boot1", "net:[1]"]), "machines", "node2 and node1 are one machine", "remove the line of node2"
    ),
    "no pdsh": Case(whole(pdsh=None), "pdsh", "not installed", "apt-get install pdsh; or start torchrun", host=HERE),
    "pdsh without ssh": Case(whole(pdsh="rsh,exec"), "pdsh", "by rsh,exec only", "built with ssh", host=HERE),
    "blank line in .deepspeed_env": Case(
        whole(exports=Exports(problems=(("~/.deepspeed_env:3", "blank", "sed -i 3d"),))),
        "deepspeed_env",
        "deepspeed_env:3: blank",
        "sed -i 3d",
        host=HERE,
    ),
    "variable lost": Case(
        facts(variables={}), "variables", "HF_HOME of this shell is lost", r'echo "HF_HOME=\$HF_HOME" >> ~/.deepspeed_env'
    ),
    "variable differs": Case(
        facts(variables={"HF_HOME": "2"}), "variables", "HF_HOME of this shell has another value there", "HF_HOME"
    ),
    "secret lost": Case(
        whole(matter={"WANDB_API_KEY": ("where the tracker reports", "7")}),
        "variables",
        "WANDB_API_KEY of this shell is lost",
        "wandb login.*prints",
    ),
    "variable that may differ": Case(
        whole(matter={"LD_LIBRARY_PATH": ("which libraries are loaded", "7")}),
        "variables",
        "LD_LIBRARY_PATH of this shell is lost",
        "LD_LIBRARY_PATH",
        host="node3",
        verdict="warn",
    ),
    "NCCL_ALGO only on one": Case(
        facts(variables={"HF_HOME": "1", "NCCL_ALGO": "9"}),
        "variables",
        "NCCL_ALGO is not what it is on the other hosts",
        "unset NCCL_ALGO in the shell's start-up files of node2",
    ),
    "RANK in this shell": Case(
        whole(leftovers=("RANK", "WORLD_SIZE")), "leftovers", "RANK", "^unset RANK WORLD_SIZE$", host=HERE, verdict="warn"
    ),
    "torchrun's marks on a host": Case(
        facts(leftovers=["RANK", "TORCHELASTIC_RUN_ID"]),
        "leftovers",
        "^RANK, TORCHELASTIC_RUN_ID in the shell",
        "unset RANK TORCHELASTIC_RUN_ID in the shell's start-up files of node2",
    ),
    "another Python": Case(facts(python="3.12.1"), "versions", "Python 3.12.1, elsewhere 3.11.9", "same Python"),
    "another torch": Case(
        facts(packages__torch="2.12.0+cu128"),
        "versions",
        r"torch 2.12.0\+cu128, elsewhere 2.13.0",
        "on node2: /venv/bin/python -m pip install torch==2.13.0$",
    ),
    "transformers missing": Case(
        facts(packages__transformers=None),
        "versions",
        "transformers is not there, elsewhere 5.23.0",
        "pip install transformers==5.23.0",
    ),
    "deepspeed missing everywhere": Case(
        facts_on("node1", "node2", "node3", packages__deepspeed=None),
        "versions",
        "deepspeed is not installed",
        "pip install deepspeed$",
        host="node1",
    ),
    "another NCCL": Case(facts(torch__nccl="2.26.2"), "versions", "NCCL 2.26.2, elsewhere 2.27.3", "install torch"),
    "another driver": Case(
        facts(driver="550.54"),
        "versions",
        "NVIDIA driver 550.54, elsewhere 570.86",
        "install driver 570.86 on node2",
        verdict="warn",
    ),
    "torch crashes": Case(
        facts(torch={"error": "no word, exit code -11 (killed by signal 11)"}, packages__torch="2.13.0"),
        "torch",
        "cannot be imported: .*signal 11",
        "ssh node2 /venv/bin/python -c 'import torch'",
    ),
    "driver too old": Case(
        facts(torch__usable=False, torch__devices=[], torch__why_not="The NVIDIA driver is too old"),
        "torch",
        "2 GPUs, and torch 2.13.0 uses none of them: The NVIDIA driver is too old",
        "driver for CUDA 12.8 .there is 570.86.",
    ),
    "torch for the CPU": Case(
        facts(torch__usable=False, torch__devices=[], torch__cuda=None),
        "torch",
        "uses none of them",
        "a torch that was built with CUDA",
    ),
    "code differs": Case(
        facts(code__files={"loop.py": "z", "train.py": "b"}),
        "code",
        "1 file of /work/ds_trainer not as elsewhere: loop.py",
        "rsync -a --delete /work/ds_trainer/ node2:/work/ds_trainer/",
    ),
    "code missing": Case(
        facts(code={"folder": None, "files": {}}), "code", "ds_trainer cannot be imported", "a folder that node2 has too"
    ),
    "more slots than GPUs": Case(slots(8), "devices", "slots=8, and 2 GPUs", "`node2 slots=2`"),
    "no GPU on one host": Case(
        facts(torch__devices=[], gpus=0), "devices", "slots=2, and 0 GPUs", "remove node2 from the hostfile"
    ),
    "fewer slots than GPUs": Case(slots(1), "devices", "slots=1, and 2 GPUs", "`node2 slots=2`", verdict="warn"),
    "another GPU": Case(
        facts(torch__devices=[H100, ["NVIDIA A100", 40 * GIB]]),
        "devices",
        "a NVIDIA A100 with 40.00 GiB, most others are NVIDIA H100 with 80.00 GiB",
        "smaller GPU",
        verdict="warn",
    ),
    "few open files": Case(facts(limits__nofile=[1000, 4096]), "limits", "1000 open files at most", r"\* - nofile 65536"),
    "little locked memory and InfiniBand": Case(
        facts(limits__memlock=[65536, 65536], infiniband=True),
        "limits",
        "0.06 MiB of memory may be locked",
        r"\* - memlock unlimited",
    ),
    "little locked memory": Case(
        facts(limits__memlock=[8 << 20, 8 << 20]), "limits", "8.00 MiB of memory may be locked", "unlimited", verdict="warn"
    ),
    "docker's /dev/shm": Case(
        facts(shm={"free": 64 << 20, "size": 64 << 20}), "shm", "64.00 MiB free of 64.00 MiB", "--shm-size"
    ),
    "no /dev/shm": Case(facts(shm=None), "shm", "no /dev/shm", "remount"),
    "clock a little off": Case(
        on("node2", clock=(-7.0, 0.1)),
        "clock",
        "7.0 s behind the other hosts",
        "on node2: systemctl enable --now chrony",
        verdict="warn",
    ),
    "clock a day off": Case(on("node2", clock=(86400.0, 0.1)), "clock", "86400.0 s ahead of", "chrony"),
    "rendezvous blocked": Case(
        on("node2", rendezvous="no answer"),
        "network",
        "192.168.0.1:29500, where the ranks meet, is not reached: no answer",
        "open TCP ports 1024-65535",
    ),
    "first address leads elsewhere": Case(
        both(facts_on("node1", first_address="172.17.0.1"), on("node3", rendezvous="someone else")),
        "network",
        "172.17.0.1:29500.*: someone else",
        "deepspeed --master_addr 192.168.0.1",
        host="node3",
    ),
    "no address": Case(
        facts_on("node1", first_address=None),
        "network",
        "`hostname -I` gives no address",
        "deepspeed --master_addr 192.168.0.1",
        host="node1",
    ),
    "a name that torchrun's workers do not know": Case(
        both(whole(launcher="torchrun"), on("node2", rendezvous="Name or service not known")),
        "network",
        "node1:29500, where the ranks meet, is not reached: Name or service not known",
        "^torchrun --rdzv-endpoint 192.168.0.1:29500$",
    ),
    "two hosts that do not meet": Case(
        on("node2", reaches=FAR), "network", "reaches node1 at none of its addresses .192.168.0.1: no answer.", "open TCP ports"
    ),
    "own name is 127.0.1.1": Case(
        facts(own_addresses=["127.0.1.1"]),
        "name",
        "its own name resolves to 127.0.1.1$",
        r"GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 >> ~/.deepspeed_env; with torchrun: export GLOO",
    ),
    "own name is ::1": Case(facts(own_addresses=["::1"]), "name", "leads to ::1, those of most other hosts to IPv4", "=eth0"),
    "own name unknown": Case(facts(own_addresses=[]), "name", "does not resolve: gloo takes 127.0.0.1", "=eth0"),
    "own name leads astray, and nobody dials it": Case(
        facts(own_addresses=["203.0.113.9"]), "name", "203.0.113.9, which the other hosts do not reach", "=eth0", verdict="warn"
    ),
    "interfaces have other names": Case(
        facts(own_addresses=["172.17.0.1"], interfaces=OTHER_NAMES),
        "name",
        "resolves to 172.17.0.1, which the other hosts do not reach",
        "interface ib0 is reached, at 192.168.0.2: write `192.168.0.2 node2` into /etc/hosts of node2",
    ),
    "no such interface": Case(
        facts(gloo_interface="eth7"), "name", "GLOO_SOCKET_IFNAME=eth7, and there is no such interface", "=eth0"
    ),
    "port taken": Case(
        facts_on("node1", port_owner={"pid": 77, "command": "python serve.py", "free": 29501}),
        "port",
        "port 29500 is taken by process 77 .python serve.py.",
        "--master_port 29501",
        host="node1",
    ),
    "model missing on one host": Case(
        paths("/data/model", found=False), "paths", "model.path: /data/model is not there", "share or copy it"
    ),
    "data cannot be read": Case(
        paths("/data/x.jsonl", found=True, error="x: Permission denied"),
        "paths",
        "data.sources: cannot be read: x: Permission denied",
        r"chmod -R a\+rX /data/x.jsonl",
    ),
    "data differs": Case(
        paths("/data/x.jsonl", found=True, files=1, bytes=1, digest="y"),
        "paths",
        "/data/x.jsonl holds something else than on the other hosts",
        "copy it to node2 anew",
    ),
    "run folder read-only": Case(
        on("node2", folder={"error": "/out/run: Read-only file system"}, sees_first=None),
        "run_folder",
        "/out/run: Read-only file system",
        "may write on every host",
    ),
    "run folder not shared": Case(
        on("node2", sees_first=False), "run_folder", "what node1 wrote there is not seen", "that all hosts mount"
    ),
    "disk too small": Case(
        on("node2", folder=SMALL),
        "disk",
        "25.00 GiB free in /out/run, and 30.00 GiB wanted",
        "free 5.00 GiB, or set checkpoint.keep_last=1",
    ),
    "no compiler": Case(
        op(built=False, lacks="DeepSpeed's op cpu_adam needs a C++ compiler, and `c++` was not found. Install g++."),
        "ops",
        "needs a C\\+\\+ compiler",
        "^Install g\\+\\+",
    ),
    "stale lock": Case(
        op(built=False, stale_lock_seconds=180.0),
        "ops",
        "killed 3 min ago left a lock behind",
        "rm /ops/fused_adam/lock",
        verdict="warn",
    ),
    "no CUDA toolkit": Case(op(built=False, nvcc=None), "ops", "there is no CUDA toolkit", "install the CUDA toolkit 12.8"),
    "another CUDA": Case(
        op(built=False, nvcc="11.8"), "ops", "the CUDA toolkit is 11.8, and torch was built with 12.8", "12.8"
    ),
    "a little other CUDA": Case(
        op(built=False, nvcc="12.4"), "ops", "is 12.4, and torch was built with 12.8", "12.8", verdict="warn"
    ),
    "op not built yet": Case(op(built=False), "ops", "fused_adam is not built yet", "--build", verdict="warn"),
    "op that failed to build": Case(op(failed="g++ said no. Install more."), "ops", "g\\+\\+ said no$", "Install more."),
    "collective hangs": Case(
        whole(collectives={"answer": None, "failed": [[2, "no answer within 180 s"]]}),
        "collectives",
        "rank 2: no answer within 180 s",
        "NCCL_DEBUG",
    ),
    "wrong sums": Case(
        whole(collectives={"answer": {**MEASURED, "wrong": [3]}, "failed": []}),
        "collectives",
        "rank 3 received wrong sums",
        "take node2 out",
    ),
    "slow rank": Case(
        whole(collectives={"answer": {**MEASURED, "alone": [1.0, 1.0, 2.5, 1.0, 1.0, 1.0]}, "failed": []}),
        "collectives",
        "rank 2 computes 2.5 times as long",
        "see what else runs on node2",
        verdict="warn",
    ),
}


def test_a_healthy_cluster_has_nothing_wrong():
    findings = judge(HEALTHY)
    assert [each for each in findings if each.verdict != "ok"] == []
    assert {each.check for each in findings} == {check.name for check in CHECKS}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_set_up_is_named(name: str):
    case = BROKEN[name]
    findings = [each for each in judge(case.broken(HEALTHY)) if each.verdict in ("warn", "fail")]
    named = [each for each in findings if each.check == case.check and each.host == case.host]
    assert len(named) == 1, findings
    assert named[0].verdict == case.verdict
    assert re.search(case.found, named[0].found), named[0]
    assert re.search(case.fix, named[0].fix), named[0]
    assert named[0].rule
    assert {each.check for each in findings} == {case.check}, "and nothing else is called broken"


def test_every_check_has_a_set_up_that_it_names():
    assert {case.check for case in BROKEN.values()} == {check.name for check in CHECKS}


def test_one_machine_alone_is_not_judged_by_what_a_launcher_would_send():
    alone = replace(HEALTHY, hosts=HEALTHY.hosts[:1], alone=True, pdsh=None, matter={"HF_HOME": ("", "other")})
    alone = facts_on("node1", port_owner={"pid": 1, "command": "x", "free": 29501}, own_addresses=["127.0.0.1"])(alone)
    findings = judge(alone)
    assert [(each.check, each.verdict) for each in findings if each.verdict != "ok"] == [("port", "warn")]
    assert not {"ssh", "pdsh", "deepspeed_env", "network", "name", "clock"} & {each.check for each in findings}


def test_torchrun_is_not_judged_by_what_pdsh_would_do():
    matter = {"HF_HOME": ("where models are found", "other")}
    problems = Exports(problems=((".deepspeed_env:1", "blank", "sed"),))
    torchrun = replace(HEALTHY, launcher="torchrun", pdsh=None, matter=matter, exports=problems)
    findings = judge(facts(folder="/my work")(torchrun))
    assert [each for each in findings if each.verdict != "ok"] == []
    assert not {"pdsh", "deepspeed_env"} & {each.check for each in findings}


def test_a_port_that_another_program_holds_still_shows_that_the_way_is_open():
    taken = facts_on("node1", port_owner={"pid": 1, "command": "x", "free": 29501})
    evidence = both(taken, on("node2", rendezvous="someone else"))(HEALTHY)
    assert [each.check for each in judge(evidence) if each.verdict == "fail"] == ["port"]


def test_the_odd_one_out_is_named_and_not_the_many():
    findings = judge(facts_on("node1", python="3.10.1")(HEALTHY))
    assert [(each.check, each.host) for each in findings if each.verdict == "fail"] == [("versions", "node1")]


def test_what_is_not_known_about_a_checkpoint_is_said():
    findings = judge(replace(HEALTHY, checkpoint=None, no_checkpoint="owner/name is not on this machine"))
    (found,) = {each.found for each in findings if each.verdict == "skip"}
    assert found == "100.00 GiB free; how large a checkpoint is, is not known: owner/name is not on this machine"
