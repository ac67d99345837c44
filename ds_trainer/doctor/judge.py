"""From what was found on the hosts to what is wrong with them. Pure: evidence in, findings out.

A check is a function that yields a finding for every host it looked at. `CHECKS` gives their order: what is mended first stands
first, since one cause often explains what comes after it.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from statistics import median_low
from typing import Any, TypeVar

from ds_trainer.checkpoint.layout import in_words
from ds_trainer.doctor.evidence import HERE, NO_FOLDER, NO_PYTHON, Evidence, Finding, HostEvidence, Verdict
from ds_trainer.launch.exports import COMMON_VARIABLES, ONLY_WARNED, SECRET
from ds_trainer.launch.starters import identify

T = TypeVar("T")

CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 1.0, 300.0
"""Above the first, logs cannot be read side by side; above the second, Kerberos and signed requests are refused."""
SHM_BYTES = 1 << 30
"""What NCCL's guide gives a container (--shm-size=1g).
Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting/runtime_and_mpi_issues.html"""
SLOW_FACTOR = 1.5
"""A rank that computes so much longer than the one in the middle holds all others up."""
AWKWARD = r"[^\w@%+=:,./-]"
"""What a shell may take for something else, as in `shlex.quote`."""
_MANY = 4
"""Names that are listed in full."""


def judge(evidence: Evidence) -> list[Finding]:
    """What all checks say, in the order of `CHECKS`."""
    return [replace(finding, check=check.name) for check in CHECKS for finding in check.run(evidence)]


def _say(verdict: Verdict, host: str | HostEvidence, found: str, rule: str = "", fix: str = "") -> Finding:
    name = host if isinstance(host, str) else host.name
    return Finding(check="", host=name, verdict=verdict, found=found, rule=rule, fix=fix)


# --- reaching the hosts ---

_SSH_FIXES = (
    ("could not resolve", "write a name that ssh knows, or give it an address in ~/.ssh/config: Host {host}, HostName ADDRESS"),
    ("has changed", "if the host was really set up anew: ssh-keygen -R {host}, then ssh {host} once"),
    ("host key verification failed", "compare its fingerprint, then: ssh-keyscan {host} >> ~/.ssh/known_hosts"),
    ("permission denied", "let this user in with a key that has no passphrase or is in ssh-agent: ssh-copy-id {host}"),
    ("connection refused", "start sshd there (systemctl start ssh), or give its port in ~/.ssh/config: Host {host}, Port 22"),
    ("timed out", "is the host up, and port 22 open for this machine? nc -vz {host} 22"),
    ("no route", "is the host up, and on a network that this machine reaches? ping {host}"),
    ("no answer within", "`ssh {host} true` must end by itself: a login script, a ForceCommand or a full home waits there"),
    ("not installed", "apt-get install openssh-client"),
)


def ssh(evidence: Evidence) -> Iterator[Finding]:
    """Every host answers through ssh, and asks for nothing."""
    for host in evidence.hosts:
        if host.lost is None or host.lost.startswith((NO_FOLDER, NO_PYTHON)):
            if not evidence.alone:
                yield _say("ok", host, "answers without a prompt")
            continue
        fix = next((fix for words, fix in _SSH_FIXES if words in host.lost.lower()), "see what `ssh {host} true` says")
        rule = "`deepspeed` starts the workers through ssh, and `doctor` asks through it: nobody can answer a prompt there"
        yield _say("fail", host, host.lost, rule, fix.format(host=host.name))


def python(evidence: Evidence) -> Iterator[Finding]:
    """The current folder and the interpreter are there, under the same paths."""
    for host in evidence.hosts:
        if host.lost and host.lost.startswith((NO_FOLDER, NO_PYTHON)):
            rule = "the launcher goes to the folder it is started in, and starts the interpreter it runs with, on every host"
            path = host.lost.removeprefix(NO_FOLDER).removeprefix(NO_PYTHON)
            folder = path.rpartition("/bin/")[0] or path
            yield _say("fail", host, host.lost, rule, f"share or copy it: rsync -a {folder}/ {host.name}:{folder}/")
        elif host.facts:
            places = host.facts["folder"], host.facts["executable"]
            awkward = next((each for each in places if evidence.through_pdsh and re.search(AWKWARD, each)), None)
            if awkward:
                rule = "DeepSpeed hands both to every host's shell without quotes (launcher/multinode_runner.py)"
                fix = f"mv '{awkward}' {re.sub(AWKWARD, '_', awkward)}"
                yield _say("fail", host, f"`{awkward}` means something else to a shell", rule, fix)
            else:
                yield _say("ok", host, f"{places[1]} in {places[0]}")


def machines(evidence: Evidence) -> Iterator[Finding]:
    """No machine stands in the hostfile under two names."""
    names: dict[tuple[str, ...], str] = {}
    if evidence.alone:
        return
    for host, facts in _with_facts(evidence):
        other = names.setdefault(tuple(facts["machine"]), host.name)
        if other == host.name:
            yield _say("ok", host, f"calls itself {facts['host_name']}")
        else:
            rule = "two nodes on one machine would share its devices, and NCCL refuses a device that two ranks use"
            fix = f"remove the line of {host.name} from the hostfile"
            yield _say("fail", host, f"{host.name} and {other} are one machine", rule, fix)


def pdsh(evidence: Evidence) -> Iterator[Finding]:
    """The launcher's pdsh is installed here, and can use ssh."""
    if not evidence.through_pdsh:
        return
    rule = "`deepspeed --hostfile` starts the workers of several hosts with it"
    instead = "or start torchrun on every host instead"
    if evidence.pdsh is None:
        yield _say("fail", HERE, "pdsh is not installed on this machine", rule, f"apt-get install pdsh; {instead}")
    elif "ssh" not in evidence.pdsh.split(","):
        fix = f"install a pdsh that was built with ssh (apt-get install pdsh); {instead}"
        yield _say("fail", HERE, f"this pdsh reaches hosts by {evidence.pdsh} only", rule, fix)
    else:
        yield _say("ok", HERE, "pdsh with ssh")


# --- what is sent along ---


def deepspeed_env(evidence: Evidence) -> Iterator[Finding]:
    """What DeepSpeed sends along arrives as it was written."""
    if not evidence.through_pdsh:
        return
    rule = (
        "DeepSpeed reads .deepspeed_env (here and at home) line by line as NAME=VALUE, and every host's shell reads that again"
    )
    for where, found, fix in evidence.exports.problems:
        yield _say("fail", HERE, f"{where}: {found}", rule, fix)
    if not evidence.exports.problems:
        yield _say("ok", HERE, f"{len(evidence.exports.variables)} variables are sent along")


def variables(evidence: Evidence) -> Iterator[Finding]:
    """The variables that matter are on every host what they are in this shell."""
    for host, facts in _with_facts(evidence):
        theirs, fine = facts["variables"], True
        for name, (decides, value) in evidence.matter.items():
            if theirs.get(name) == value or not evidence.through_pdsh:
                continue
            fine = False
            only_warned = any(fnmatchcase(name, pattern) for pattern in ONLY_WARNED)
            how = "has another value there" if name in theirs else "is lost"
            rule = f"it decides {decides}; only NCCL*, PYTHON*, MLFLOW*, MV2*, UCX* and what .deepspeed_env lists is sent along"
            fix = f'echo "{name}=${name}" >> ~/.deepspeed_env'
            if SECRET.search(name):
                fix = (
                    "log in on each host (hf auth login, wandb login): DeepSpeed prints what .deepspeed_env holds into its log"
                )
            yield _say("warn" if only_warned else "fail", host, f"{name} of this shell {how}", rule, fix)
        for name in COMMON_VARIABLES:
            usual = _usual({each.name: there["variables"].get(name) for each, there in _with_facts(evidence)})
            if theirs.get(name) != usual and name not in evidence.matter:  # otherwise it is said above
                fine = False
                rule = "it decides how ranks talk or what they compute: `train` refuses ranks that differ in it"
                fix = f"set or unset {name} in the shell's start-up files of {host.name} as on the others"
                yield _say("fail", host, f"{name} is not what it is on the other hosts", rule, fix)
        if fine:
            yield _say("ok", host, "as in this shell")


def leftovers(evidence: Evidence) -> Iterator[Finding]:
    """No shell carries what a launcher sets for its workers."""
    places = {HERE: evidence.leftovers}
    if not evidence.alone:
        places.update({host.name: tuple(facts["leftovers"]) for host, facts in _with_facts(evidence)})
    for place, names in places.items():
        fix = f"unset {' '.join(names)}" + ("" if place == HERE else f" in the shell's start-up files of {place}")
        found, rule = f"{_listed(names)} in the shell", "launchers set them anew, other programs obey them"
        if mistaken := _mistaken(names):
            yield _say("fail", place, found, mistaken, fix)
        elif names:
            yield _say("warn", place, found, rule, fix)
        else:
            yield _say("ok", place, "none")


_MARKS = {"torchrun": ("RANK", "TORCHELASTIC_RUN_ID"), "deepspeed": ("RANK", "CROSS_RANK", "CROSS_SIZE")}
"""What the workers of a launcher are known by."""


def _mistaken(names: Iterable[str]) -> str | None:
    """For what `train` would take its launcher when these variables are there too; None when it is not misled."""
    for launcher, marks in _MARKS.items():
        starter = identify(dict.fromkeys([*names, *marks], "0"))
        if starter.launcher != launcher:
            return f"under {launcher}, `train` would refuse to run, as it seems to be {starter.words}"
    return None


# --- the same software everywhere ---


def versions(evidence: Evidence) -> Iterator[Finding]:
    """Python, packages, NCCL and driver are the same everywhere."""
    table: dict[str, dict[str, str | None]] = {}
    for host, facts in _with_facts(evidence):
        table[host.name] = {"Python": facts["python"], **facts["packages"], "NVIDIA driver": facts["driver"]}
        if not _torch_is_broken(facts):
            table[host.name]["NCCL"] = facts["torch"]["nccl"]
    for host, facts in _with_facts(evidence):
        own, fine = table[host.name], True
        for name, version in own.items():
            usual = _usual({each: row[name] for each, row in table.items() if name in row})
            if version is None and usual is None and name in ("torch", "deepspeed", "transformers"):
                fine = False
                fix = f"{facts['executable']} -m pip install {name}"
                yield _say("fail", host, f"{name} is not installed", "every rank imports it", fix)
            if version == usual:
                continue
            fine = False
            found = f"{name} {version or 'is not there'}, elsewhere {usual or 'it is not there'}"
            if name == "NVIDIA driver":
                yield _say(
                    "warn", host, found, "NCCL is tested with one driver throughout", f"install driver {usual} on {host.name}"
                )
            else:
                rule = "`train` refuses ranks that differ in it: they may compute different things, or wait for one another"
                package = {"Python": None, "NCCL": "torch"}.get(name, name)
                wanted = (usual or "").partition("+")[0] if name != "NCCL" else facts["torch"]["version"]
                fix = f"on {host.name}: {facts['executable']} -m pip install {package}=={wanted}"
                yield _say(
                    "fail", host, found, rule, fix if package and usual else f"give {host.name} the same {name} as the others"
                )
        if fine:
            yield _say("ok", host, f"Python {own['Python']}, torch {own['torch']}, deepspeed {own['deepspeed']}")


def torch(evidence: Evidence) -> Iterator[Finding]:
    """The torch that is there can be imported, and uses the GPUs that are there."""
    for host, facts in _with_facts(evidence):
        answer = facts["torch"]
        if "error" in answer:
            there = "" if evidence.alone else f"ssh {host.name} "
            fix = f"see what it says in full: {there}{facts['executable']} -c 'import torch'"
            yield _say("fail", host, f"torch cannot be imported: {answer['error']}", "every rank imports it", fix)
        elif _torch_is_broken(facts):
            why = f": {answer['why_not']}" if answer["why_not"] else ""
            fix = "install a torch that was built with CUDA"
            if answer["cuda"]:
                fix = f"install a driver for CUDA {answer['cuda']} (there is {facts['driver']}), or a torch for an older CUDA"
            found = f"{facts['gpus']} GPUs, and torch {answer['version']} uses none of them{why}"
            yield _say("fail", host, found, "every rank would train on the CPU", fix)
        else:
            kinds = answer["devices"]
            used = f"{len(kinds)} x {kinds[0][0]}, CUDA {answer['cuda']}" if kinds else "on the CPU"
            yield _say("ok", host, f"torch {answer['version']}, {used}")


def _torch_is_broken(facts: dict[str, Any]) -> bool:
    answer = facts["torch"]
    return "error" in answer or bool(facts["gpus"] and not answer["usable"] and not facts["gpus_hidden"])


def code(evidence: Evidence) -> Iterator[Finding]:
    """The files of ds_trainer are the same everywhere."""
    usual = _usual({host.name: facts["code"]["files"] for host, facts in _with_facts(evidence)})
    rule = "ranks that run different code compute different things"
    for host, facts in _with_facts(evidence):
        folder, files = facts["code"]["folder"], facts["code"]["files"]
        differing = sorted(name for name in {*files, *usual} if files.get(name) != usual.get(name))
        if folder is None:
            fix = f"start in a folder that {host.name} has too, or install ds_trainer there"
            yield _say("fail", host, "ds_trainer cannot be imported", rule, fix)
        elif differing:
            found = f"{_count(differing, 'file')} of {folder} not as elsewhere: {_listed(differing)}"
            yield _say("fail", host, found, rule, f"rsync -a --delete {folder}/ {host.name}:{folder}/")
        else:
            yield _say("ok", host, f"{len(files)} files in {folder}")


# --- what a host is made of ---


def devices(evidence: Evidence) -> Iterator[Finding]:
    """There are as many devices as slots, of one kind."""
    kinds = {host.name: [tuple(each) for each in facts["torch"].get("devices", [])] for host, facts in _with_facts(evidence)}
    any_gpu = any(kinds.values())
    usual = _usual({f"{name} {index}": kind for name, own in kinds.items() for index, kind in enumerate(own)}, None)
    for host, facts in _with_facts(evidence):
        if _torch_is_broken(facts):
            continue  # that is said there
        have, cores = len(kinds[host.name]), facts["cores"]
        other = next((kind for kind in kinds[host.name] if kind != usual), None)
        write = f"write `{host.name} slots={have if any_gpu else cores}` in the hostfile"
        if any_gpu and host.slots > have:
            fix = write if have else f"remove {host.name} from the hostfile"
            yield _say(
                "fail", host, f"slots={host.slots}, and {have} GPUs", "each slot is a process with a GPU of its own", fix
            )
        elif not any_gpu and host.slots > cores:
            rule = "processes that share cores wait for one another"
            yield _say("warn", host, f"slots={host.slots} on {cores} CPU cores", rule, write)
        elif any_gpu and other and usual:
            found = f"a {other[0]} with {in_words(other[1])}, most others are {usual[0]} with {in_words(usual[1])}"
            rule = "ZeRO gives every rank the same share: the smallest and slowest GPU decides"
            yield _say("warn", host, found, rule, "use hosts of one kind, or plan for the smaller GPU")
        elif any_gpu and host.slots < have:
            yield _say("warn", host, f"slots={host.slots}, and {have} GPUs", "GPUs without a slot stand idle", write)
        else:
            yield _say("ok", host, f"{have} GPUs" if any_gpu else f"no GPU, {cores} CPU cores")


def limits(evidence: Evidence) -> Iterator[Finding]:
    """Enough files may be open, and memory be locked."""
    # A rank has three groups of gloo with a socket to every other rank, besides files and libraries.
    wanted = max(1024, 512 + 4 * evidence.world_size)
    where = "in /etc/security/limits.conf (for a container: --ulimit), then restart sshd"
    for host, facts in _with_facts(evidence):
        (files, _), (locked, _) = facts["limits"]["nofile"], facts["limits"]["memlock"]
        fine = True
        if files != facts["unlimited"] and files < wanted:
            fine = False
            rule = f"{evidence.world_size} ranks want {wanted}: each keeps sockets to all others"
            yield _say("fail", host, f"{files} open files at most (ulimit -n)", rule, f"write `* - nofile 65536` {where}")
        needed = [
            *(["InfiniBand"] if facts["infiniband"] else []),
            *(["offload to nvme"] if evidence.needs and evidence.needs.nvme else []),
        ]
        if locked != facts["unlimited"] and (needed or facts["torch"].get("devices")):
            fine = False
            rule = f"{needed[0] if needed else 'NCCL over a fast network'} locks buffers in memory"
            found = f"{in_words(locked)} of memory may be locked at most (ulimit -l)"
            yield _say("fail" if needed else "warn", host, found, rule, f"write `* - memlock unlimited` {where}")
        if fine:
            yield _say("ok", host, f"{files} open files")


def shm(evidence: Evidence) -> Iterator[Finding]:
    """/dev/shm holds what the ranks of a host exchange."""
    for host, facts in _with_facts(evidence):
        space = facts["shm"]
        if space is not None and space["free"] >= SHM_BYTES:
            yield _say("ok", host, f"{in_words(space['free'])} free")
            continue
        found = "there is no /dev/shm"
        if space is not None:
            found = f"/dev/shm has {in_words(space['free'])} free of {in_words(space['size'])}"
        rule = "NCCL moves data between the GPUs of a host through it, and fails with `failed to extend /dev/shm/nccl-...`"
        fix = "mount -o remount,size=16g /dev/shm (for a container: --shm-size=16g), and remove what lies there"
        yield _say("fail" if facts["torch"].get("devices") and host.slots > 1 else "warn", host, found, rule, fix)


def clock(evidence: Evidence) -> Iterator[Finding]:
    """The clocks agree."""
    offsets = {host.name: host.clock for host in evidence.hosts if host.clock is not None}
    if len(offsets) < 2:
        return
    usual = median_low(offset for offset, _ in offsets.values())
    for name_, (offset, error) in offsets.items():
        ahead = offset - usual
        beyond = abs(ahead) - error
        if beyond <= CLOCK_WARN_SECONDS:
            yield _say("ok", name_, f"within {abs(ahead) + error:.2f} s")
            continue
        found = f"the clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the other hosts"
        rule = (
            "a run does not depend on it; logs cannot be compared, and from five minutes on tickets and signatures are refused"
        )
        verdict: Verdict = "fail" if beyond > CLOCK_FAIL_SECONDS else "warn"
        yield _say(verdict, name_, found, rule, f"on {name_}: systemctl enable --now chrony")


# --- the network between them ---


def network(evidence: Evidence) -> Iterator[Finding]:
    """Every host reaches the rendezvous, and every other host."""
    if len(evidence.hosts) < 2:
        return
    first = evidence.hosts[0]
    if first.facts is not None and evidence.master is None:
        good = next(iter(_good_interfaces(evidence, first, first.facts).values()), "ADDRESS")
        rule = "`deepspeed` asks the first host so for the address where the ranks meet"
        yield _say("fail", first, "`hostname -I` gives no address there", rule, _meet_at(evidence, good))
    open_ports = f"open TCP ports 1024-65535 between the hosts: ranks meet at {evidence.port}, gloo and NCCL then choose any"
    rule = "every rank dials the rendezvous and then all other ranks, and waits for minutes where nobody answers"
    for host in evidence.answering:
        fine = True
        # Where the port is taken, its owner answers: then the way is open.
        taken = first.facts is not None and first.facts["port_owner"] is not None and host.rendezvous == "someone else"
        if host.rendezvous not in (None, "ok") and not taken:
            fine = False
            found = f"{evidence.master}:{evidence.port}, where the ranks meet, is not reached: {host.rendezvous}"
            there = host.reaches.get(first.name, {})
            other = next((address for address, result in there.items() if result == "ok"), None)
            fix = _meet_at(evidence, other) if other and there.get(str(evidence.master)) != "ok" else open_ports
            yield _say("fail", host, found, rule, fix)
        for peer, results in host.reaches.items():
            if results and "ok" not in results.values():
                fine = False
                tried = ", ".join(f"{address}: {result}" for address, result in results.items())
                yield _say("fail", host, f"reaches {peer} at none of its addresses ({tried})", rule, open_ports)
        if fine:
            yield _say("ok", host, f"reaches {_count(host.reaches, 'other host')}")


def _meet_at(evidence: Evidence, address: str) -> str:
    if evidence.launcher == "torchrun":
        return f"torchrun --rdzv-endpoint {address}:{evidence.port}"
    return f"deepspeed --master_addr {address}"


def name(evidence: Evidence) -> Iterator[Finding]:
    """A host's own name leads the others to it."""
    if len(evidence.hosts) < 2:
        return
    rule = "gloo tells the other ranks the address that its host's name resolves to: they dial in vain, and the run hangs"
    addresses = {host.name: _gloo_address(facts) for host, facts in _with_facts(evidence)}
    family = _usual({name_: ipaddress.ip_address(address).version for name_, address in addresses.items() if address})
    for host, facts in _with_facts(evidence):
        address, interface = addresses[host.name], facts["gloo_interface"]
        who = f"GLOO_SOCKET_IFNAME={interface}" if interface else "its own name"
        fix = _interface_fix(evidence, host, facts)
        if address is None:
            yield _say("fail", host, f"{who}, and there is no such interface", "gloo stops there", fix)
        elif ipaddress.ip_address(address).version != family:
            found = f"{who} leads to {address}, those of most other hosts to IPv{family}"
            yield _say("fail", host, found, "gloo stops where two ranks have addresses of different kinds", fix)
        elif _is_reached(evidence, host, address):
            yield _say("ok", host, f"{who} leads to {address}")
        else:
            why = f"resolves to {address}" if facts["own_addresses"] or interface else f"does not resolve: gloo takes {address}"
            beyond = "" if _is_loopback(address) else ", which the other hosts do not reach"
            # Of two ranks the one with the larger address dials (pytorch/gloo, transport/tcp/device.cc, `isInitiator`).
            ours = ipaddress.ip_address(address).packed
            others = [each for name_, each in addresses.items() if name_ != host.name and each]
            if any(ipaddress.ip_address(each).packed >= ours for each in others):
                yield _say("fail", host, f"{who} {why}{beyond}", rule, fix)
            else:
                luck = "gloo tells it the other ranks; none dials it, as of two the one with the larger address dials: luck"
                yield _say("warn", host, f"{who} {why}{beyond}", luck, fix)


def _gloo_address(facts: dict[str, Any]) -> str | None:
    """What gloo tells the other ranks; None where it is told an interface that is not there.

    Source: torch 2.13, torch/csrc/distributed/c10d/ProcessGroupGloo.cpp (`createDefaultDevice`).
    """
    interface = (facts["gloo_interface"] or "").partition(",")[0]
    if interface:
        return next((each["address"] for each in facts["interfaces"] if each["name"] == interface), None)
    return str((facts["own_addresses"] or ["127.0.0.1"])[0]).partition("%")[0]


def _interface_fix(evidence: Evidence, host: HostEvidence, facts: dict[str, Any]) -> str:
    """Name the interface that the other hosts reach."""
    good = _good_interfaces(evidence, host, facts)
    everywhere = [each for each in good if all(each in _good_interfaces(evidence, *other) for other in _with_facts(evidence))]
    if everywhere:
        both = " ".join(f"{library}_SOCKET_IFNAME={everywhere[0]}" for library in ("GLOO", "NCCL"))
        return f"printf '%s\\n' {both} >> ~/.deepspeed_env; with torchrun: export {both} on every host"
    if good:
        interface, address = next(iter(good.items()))
        own = facts["host_name"]
        return f"its interface {interface} is reached, at {address}: write `{address} {own}` into /etc/hosts of {host.name}"
    return "none of its addresses is reached by all the others: mend the network first"


def _good_interfaces(evidence: Evidence, host: HostEvidence, facts: dict[str, Any]) -> dict[str, str]:
    """Interfaces of a host that all others reach -> the address."""
    found: dict[str, str] = {}
    for each in facts["interfaces"]:
        if not each["loopback"] and _is_reached(evidence, host, each["address"]):
            found.setdefault(each["name"], each["address"])
    return found


def _is_reached(evidence: Evidence, host: HostEvidence, address: str) -> bool:
    """Whether every other host reaches this one at the address, but for those that reach it at none (`network` says so)."""
    answers = [each.reaches.get(host.name, {}) for each in evidence.answering if each.name != host.name]
    return not _is_loopback(address) and all(each.get(address) == "ok" for each in answers if "ok" in each.values())


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def port(evidence: Evidence) -> Iterator[Finding]:
    """The port of the rendezvous is free on the first host."""
    host = evidence.hosts[0]
    if host.facts is None:
        return
    owner = host.facts["port_owner"]
    if owner is None:
        yield _say("ok", host, f"{evidence.port} is free")
        return
    who = f"by process {owner['pid']} ({owner['command']})" if owner["pid"] else "by a process that cannot be seen from here"
    option = "--master_port" if evidence.launcher == "deepspeed" else "--rdzv-endpoint, port"
    fix = f"end that process, or choose another port: {option} {owner['free']}"
    rule = "the ranks meet there" + ("; torchrun finds another one by itself" if evidence.alone else "")
    yield _say("warn" if evidence.alone else "fail", host, f"port {evidence.port} is taken {who}", rule, fix)


# --- what the run file names ---


def paths(evidence: Evidence) -> Iterator[Finding]:
    """Model and data can be read, and are the same."""
    asked = {host.name: host.paths for host in evidence.answering if host.paths is not None}
    if evidence.needs is None:
        return
    for host_name, own in asked.items():
        fine = True
        for path, setting in evidence.needs.paths.items():
            nowhere = not any(theirs[path]["found"] for theirs in asked.values())
            rule = "every rank reads it"
            if not own[path]["found"]:
                found = f"{setting}: {path} is not there"
                fix = "paths start from the folder the launcher is started in: correct it" if nowhere else "share or copy it"
            elif "error" in own[path]:
                found, fix = f"{setting}: cannot be read: {own[path]['error']}", f"chmod -R a+rX {path}"
            elif own[path]["digest"] != _usual({each: theirs[path].get("digest") for each, theirs in asked.items()}):
                size = f"{own[path]['files']} files, {in_words(own[path]['bytes'])}"
                found = f"{setting}: {path} holds something else than on the other hosts ({size})"
                fix, rule = f"copy it to {host_name} anew, or share it", "ranks that read different data train to no purpose"
            else:
                continue
            fine = False
            yield _say("fail", host_name, found, rule, fix)
        if fine:
            hub = f"; from the hub: {_listed([*evidence.needs.hub_ids])}" if evidence.needs.hub_ids else ""
            yield _say("ok", host_name, f"{_count(evidence.needs.paths, 'path')} can be read{hub}")


def run_folder(evidence: Evidence) -> Iterator[Finding]:
    """The run folder can be written, and is one folder for all hosts."""
    for host in evidence.answering:
        if host.folder is None or evidence.needs is None:
            continue
        folder, first = evidence.needs.run_folder, evidence.hosts[0].name
        if "error" in host.folder:
            rule = "every rank writes its log and its part of a checkpoint there"
            fix = "set checkpoint.folder to a folder that this user may write on every host"
            yield _say("fail", host, f"checkpoint.folder cannot be written: {host.folder['error']}", rule, fix)
        elif host.sees_first is False:
            found = f"{folder} is not shared: what {first} wrote there is not seen ({host.folder['file_system']})"
            rule = "a checkpoint is one folder with a file of each rank, and complete when all are there"
            yield _say("fail", host, found, rule, "set checkpoint.folder to a folder on a file system that all hosts mount")
        else:
            yield _say("ok", host, f"{folder} ({host.folder['file_system']})")


def disk(evidence: Evidence) -> Iterator[Finding]:
    """The disk holds the checkpoints that are kept."""
    for host in evidence.answering:
        if evidence.needs is None or not host.folder or not host.folder.get("space"):
            continue
        free = host.folder["space"]["free"]
        if evidence.checkpoint is None:
            yield _say(
                "skip", host, f"{in_words(free)} free; how large a checkpoint is, is not known: {evidence.no_checkpoint}"
            )
            continue
        size, how = evidence.checkpoint
        count = max(1, evidence.needs.keep - host.folder["checkpoints"])
        wanted = min(size * count, int(evidence.needs.max_bytes or size * count) + size)
        if free >= wanted:
            yield _say("ok", host, f"{in_words(free)} free, {count} checkpoints of {in_words(size)} to come")
            continue
        found = f"{in_words(free)} free in {evidence.needs.run_folder}, and {in_words(wanted)} wanted"
        rule = f"{count} checkpoints of {in_words(size)} ({how}) will lie there at a time"
        fewer = ", or set checkpoint.keep_last=1" if free >= 2 * size else ", or set checkpoint.folder to a larger disk"
        yield _say("fail", host, found, rule, f"free {in_words(wanted - free)}{fewer}")


def ops(evidence: Evidence) -> Iterator[Finding]:
    """The ops that are compiled for this run are built, or can be."""
    for host in evidence.answering:
        for op in host.ops or ():
            yield _say_op(host, op)
        if host.ops == []:
            yield _say("ok", host, "this run compiles none")


def _say_op(host: HostEvidence, op: dict[str, Any]) -> Finding:
    if op.get("failed"):
        what, _, fix = op["failed"].partition(". ")
        return _say("fail", host, what, "the run needs it", fix or "see the compiler's output: ds_trainer doctor --build there")
    lock = f"{op['folder']}/lock"
    cuda, nvcc = op["torch_cuda"], op["nvcc"]
    toolkit = f"install the CUDA toolkit {cuda}, and set CUDA_HOME to it"
    if op["stale_lock_seconds"] is not None:
        found = f"{op['op']}: a build that was killed {op['stale_lock_seconds'] / 60:.0f} min ago left a lock behind ({lock})"
        rule = "DeepSpeed alone waits for it for ever; `train` and `doctor --build` remove it"
        return _say("warn", host, found, rule, f"rm {lock}")
    if op["built"]:
        return _say("ok", host, f"{op['op']} is built ({op['folder']})")
    if op["lacks"]:
        what, _, fix = op["lacks"].partition(". ")
        return _say("fail", host, what, "the run compiles it", fix)
    if cuda and not nvcc:
        found = f"{op['op']} is not built, and there is no CUDA toolkit (nvcc)"
        return _say("fail", host, found, "it is compiled for the GPU", toolkit)
    if cuda and nvcc != cuda:
        other_major = nvcc.partition(".")[0] != cuda.partition(".")[0]
        rule = "DeepSpeed refuses to build with another major version, and warns of another minor one"
        found = f"{op['op']} is not built, the CUDA toolkit is {nvcc}, and torch was built with {cuda}"
        return _say("fail" if other_major else "warn", host, found, rule, toolkit)
    rule = "the first start compiles it, which takes minutes"
    fix = "the same command with --build does it now"
    return _say("warn", host, f"{op['op']} is not built yet (there is {op['compiler']})", rule, fix)


# --- all together ---


def collectives(evidence: Evidence) -> Iterator[Finding]:
    """The ranks of all hosts exchange tensors, get the right sums, and none is slow."""
    if evidence.collectives is None:
        yield from (_say("skip", host, evidence.no_collectives) for host in evidence.hosts)
        return
    answer = evidence.collectives["answer"] or {"alone": [], "wrong": []}
    times, wrong, failed = answer["alone"], answer["wrong"], dict(evidence.collectives["failed"])
    middle = median_low(times) if times else 1.0
    for host in evidence.hosts:
        ranks = [rank for rank, each in enumerate(evidence.hosts_by_rank) if each == host.name]
        slow = [rank for rank in ranks if times and times[rank] > SLOW_FACTOR * middle]
        if stopped := [rank for rank in ranks if rank in failed]:
            fix = "mend what stands above first; with NCCL_DEBUG=INFO in ~/.deepspeed_env NCCL says more"
            yield _say("fail", host, f"rank {stopped[0]}: {failed[stopped[0]]}", "a run would end, or hang, the same way", fix)
        elif bad := [rank for rank in ranks if rank in wrong]:
            fix = f"take {host.name} out of the hostfile, and have its memory, GPU and network card tested"
            yield _say("fail", host, f"rank {bad[0]} received wrong sums", "training would compute something else", fix)
        elif slow:
            found = f"rank {slow[0]} computes {times[slow[0]] / middle:.1f} times as long as the rank in the middle"
            fix = f"see what else runs on {host.name} (top, nvidia-smi), and whether it is hot or throttled"
            yield _say("warn", host, found, "all ranks wait for the slowest one in every step", fix)
        else:
            yield _say("ok", host, _count(ranks, "rank"))


@dataclass(frozen=True, slots=True)
class Check:
    """A row of the table."""

    name: str
    run: Callable[[Evidence], Iterator[Finding]]

    @property
    def asks(self) -> str:
        """What it makes sure of, in a sentence."""
        return (self.run.__doc__ or "").strip()


CHECKS = tuple(
    Check(run.__name__, run)
    for run in (
        *(ssh, python, machines, pdsh, deepspeed_env, variables, leftovers),
        *(versions, torch, code, devices, limits, shm, clock),
        *(network, name, port, paths, run_folder, disk, ops, collectives),
    )
)


def _with_facts(evidence: Evidence) -> Iterator[tuple[HostEvidence, dict[str, Any]]]:
    """The hosts that answered, with what they answered."""
    for host in evidence.hosts:
        if host.facts is not None:
            yield host, host.facts


def _usual(values: Mapping[str, T], default: Any = ()) -> T:
    """The value most hosts have; of several, that of the earliest host."""
    counts = Counter(map(repr, values.values()))
    return max(values.values(), key=lambda value: counts[repr(value)], default=default)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MANY]) + (f" and {len(names) - _MANY} more" if len(names) > _MANY else "")


def _count(things: Iterable[Any], word: str) -> str:
    number = len([*things])
    return f"{number} {word}{'' if number == 1 else 's'}"
