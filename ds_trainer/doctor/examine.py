"""The story of `doctor`: reach the hosts, ask what each has, let them call one another, and judge."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import uuid
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_trainer.arguments.merge import Resolved
from ds_trainer.doctor.evidence import HERE, Evidence, HostEvidence, meeting_place
from ds_trainer.doctor.judge import judge
from ds_trainer.doctor.needs import Needs, checkpoint_bytes, needs_of
from ds_trainer.doctor.probe import LEFTOVER, fingerprint
from ds_trainer.doctor.remote import Host, Unanswered, ask_all, clock_offset, local_command, ssh_command
from ds_trainer.launch.choose import LauncherName
from ds_trainer.launch.exports import COMMON_VARIABLES, Exports, read_exports, that_matter
from ds_trainer.launch.hostfile import HostSlots

Report = Callable[[str], None]

TORCH_SECONDS = 90
"""To import torch and start CUDA from a cold network file system."""
PATHS_SECONDS = 120
"""To look at many files on a network file system."""
SHARED_SECONDS = 5
"""After which a file that one host wrote is seen on all of them."""
COLLECTIVE_SECONDS, BUILD_SECONDS = 180, 30 * 60
BEFORE_COLLECTIVES = ("ssh", "python", "machines", "versions", "torch", "code", "devices", "network", "name", "port")
"""Checks without which ranks cannot meet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the user asked for."""

    hosts: tuple[HostSlots, ...] | None
    """Of the hostfile; None examines this machine alone."""
    resolved: Resolved | None
    """The run that is meant to run there."""
    launcher: LauncherName
    """What will start it on the hosts."""
    port: int
    seconds: float
    """A host that does not answer for so long is given up."""
    collectives: bool
    build: bool


def examine(wishes: Wishes, environ: Mapping[str, str], report: Report) -> Evidence:
    """Find out everything that `judge` needs. Leaves nothing behind on any host.

    Args:
        wishes: what is examined.
        environ: of the shell that the launcher would be started in.
        report: takes a line for the user, about what is being done.
    """
    exports, sent = Exports(), {}
    if wishes.launcher == "deepspeed":
        exports = read_exports(environ, Path.home(), Path.cwd())
        # DeepSpeed puts the folder it is started in in front (launcher/runner.py).
        path = os.pathsep.join(filter(None, [os.getcwd(), exports.variables.get("PYTHONPATH")]))
        sent = {**exports.variables, "PYTHONPATH": path}
    hosts = _start(wishes, environ, sent, report)
    try:
        with ThreadPoolExecutor(1) as counter:
            # Counting parameters imports torch and transformers here: the hosts are asked meanwhile.
            checkpoint = counter.submit(_checkpoint, wishes.resolved)
            return _ask(wishes, environ, exports, hosts, checkpoint, report)
    finally:
        with ThreadPoolExecutor(len(hosts)) as closers:
            list(closers.map(Host.close, hosts))


def _start(wishes: Wishes, environ: Mapping[str, str], sent: Mapping[str, str], report: Report) -> list[Host]:
    def say(host: str, line: str) -> None:
        report(line if wishes.hosts is None else f"{host}: {line}")

    if wishes.hosts is None:
        hosts = [Host(HERE, 1, local_command(), {}, say)]
    else:
        report(f"reaching {len(wishes.hosts)} hosts")
        # What pdsh hands its ssh, ours is handed too.
        options = shlex.split(environ.get("PDSH_SSH_ARGS_APPEND", ""))
        for_python = {name: value for name, value in sent.items() if name.startswith("PYTHON")}
        hosts = [Host(each.name, each.slots, ssh_command(each.name, for_python, options), sent, say) for each in wishes.hosts]
    with ThreadPoolExecutor(len(hosts)) as greeters:
        list(greeters.map(lambda host: host.hello(wishes.seconds), hosts))
    return hosts


def _ask(
    wishes: Wishes,
    environ: Mapping[str, str],
    exports: Exports,
    hosts: list[Host],
    checkpoint: Future[tuple[tuple[int, str] | None, str]],
    report: Report,
) -> Evidence:
    needs = needs_of(wishes.resolved) if wishes.resolved else None
    limit = wishes.seconds
    matter = {name: (why, fingerprint(environ[name])) for name, why in that_matter(environ).items()}
    asked = [*dict.fromkeys([*matter, *COMMON_VARIABLES])]
    report("asking what each host has")
    clocks = _clocks(hosts, limit)
    facts = ask_all(
        hosts,
        "facts",
        TORCH_SECONDS + limit,
        lambda host: {"variables": asked, "port": wishes.port, "torch_seconds": TORCH_SECONDS},
    )
    slots = {host.name: host.slots if wishes.hosts is not None else _devices(facts.get(host.name)) for host in hosts}
    reaches, rendezvous = _call_around(hosts, facts, wishes, limit) if len(hosts) > 1 else ({}, {})
    paths: dict[str, Any] = {}
    folders: dict[str, Any] = {}
    sees: dict[str, bool] = {}
    ops: dict[str, Any] = {}
    if needs is not None:
        report("looking at paths, the run folder and ops")
        names = list(needs.paths)
        answers = ask_all(hosts, "paths", PATHS_SECONDS + limit, lambda _: {"paths": names})
        paths = {name: answer["paths"] for name, answer in answers.items()}
        folders, sees = _share(hosts, needs, limit)
        ops = _ops(hosts, needs, facts, wishes.build, report)
    size, unknown = checkpoint.result()
    evidence = Evidence(
        hosts=tuple(
            HostEvidence(
                name=host.name,
                slots=slots[host.name],
                lost=host.lost,
                facts=facts.get(host.name),
                clock=clocks.get(host.name),
                reaches=reaches.get(host.name, {}),
                rendezvous=rendezvous.get(host.name),
                paths=paths.get(host.name),
                folder=folders.get(host.name),
                sees_first=sees.get(host.name),
                ops=ops.get(host.name),
            )
            for host in hosts
        ),
        alone=wishes.hosts is None,
        launcher=wishes.launcher,
        port=wishes.port,
        pdsh=_pdsh(),
        exports=exports,
        matter=matter,
        leftovers=tuple(sorted(name for name in environ if LEFTOVER.fullmatch(name))),
        needs=needs,
        checkpoint=size,
        no_checkpoint=unknown,
    )
    return _with_collectives(evidence, wishes, hosts, report)


def _devices(facts: dict[str, Any] | None) -> int:
    """Processes that would run on this machine alone: one a GPU."""
    return max(1, len(facts["torch"].get("devices") or ())) if facts else 1


def _pdsh() -> str | None:
    """The ways by which pdsh can reach hosts, separated by commas; None when it is not installed."""
    if not shutil.which("pdsh"):
        return None
    done = subprocess.run(["pdsh", "-V"], capture_output=True, text=True, timeout=10, check=False)
    for line in (done.stdout + done.stderr).splitlines():
        if line.startswith("rcmd modules:"):
            return line.partition(":")[2].split("(")[0].replace(" ", "")
    return "ssh"


def _clocks(hosts: list[Host], limit: float) -> dict[str, tuple[float, float]]:
    """One host after the other: what one waits for the others would count as its clock's error."""
    found = {}
    for host in hosts:
        if not host.lost:
            with contextlib.suppress(Unanswered):  # the host says itself why
                found[host.name] = clock_offset(host, limit)
    return found


def _call_around(
    hosts: list[Host], facts: Mapping[str, dict[str, Any]], wishes: Wishes, limit: float
) -> tuple[dict[str, dict[str, dict[str, str]]], dict[str, str]]:
    """Let every host listen, on the first one at the rendezvous too, and every other one call all its addresses."""
    tokens = {host.name: f"{host.name} {uuid.uuid4().hex}" for host in hosts}
    first, port = hosts[0], wishes.port
    place = meeting_place(wishes.launcher, first.name, facts.get(first.name))
    ports = ask_all(hosts, "listen", limit, lambda host: {"port": port if host is first else 0, "token": tokens[host.name]})
    calls: dict[str, list[tuple[str, str, int]]] = {}
    for host in hosts:
        calls[host.name] = [
            (peer.name, each["address"], ports[peer.name]["other"])
            for peer in hosts
            if peer is not host and peer.name in ports and peer.name in facts
            for each in facts[peer.name]["interfaces"]
            if not each["loopback"]
        ]
        if host is not first and first.name in facts and place:
            calls[host.name].append((first.name, place, port))
    answers = ask_all(
        hosts,
        "dial",
        limit + 60,
        lambda host: {"calls": [[address, number, tokens[peer]] for peer, address, number in calls[host.name]]},
    )
    ask_all(hosts, "unlisten", limit)
    reaches: dict[str, dict[str, dict[str, str]]] = {}
    rendezvous: dict[str, str] = {}
    for name, answer in answers.items():
        for (peer, address, number), result in zip(calls[name], answer["results"], strict=True):
            if number == port and peer == first.name:
                rendezvous[name] = result
            else:
                reaches.setdefault(name, {}).setdefault(peer, {})[address] = result
    return reaches, rendezvous


def _share(hosts: list[Host], needs: Needs, limit: float) -> tuple[dict[str, Any], dict[str, bool]]:
    """Write a file into the run folder on every host, and look on every host for that of the first."""
    mark = uuid.uuid4().hex[:8]
    token = {host.name: f".doctor-{mark}-{index}" for index, host in enumerate(hosts)}
    try:
        written = ask_all(hosts, "leave_token", limit, lambda host: {"folder": needs.run_folder, "name": token[host.name]})
        first = hosts[0].name
        if "error" in written.get(first, {"error": ""}):
            return written, {}
        look = {"folder": needs.run_folder, "names": [token[first]], "seconds": SHARED_SECONDS}
        seen = ask_all(hosts, "see_tokens", SHARED_SECONDS + limit, lambda host: look)
        return written, {name: bool(answer["seen"]) for name, answer in seen.items()}
    finally:
        for _ in range(2):  # a folder that was made for it can be removed when all hosts have taken their files out
            ask_all(hosts, "remove_tokens", limit)


def _ops(
    hosts: list[Host], needs: Needs, facts: Mapping[str, dict[str, Any]], build: bool, report: Report
) -> dict[str, list[dict[str, Any]]]:
    """What each host has of the compiled ops; builds them first where that is asked."""
    wanted = {
        name: needs.ops["cuda" if each["torch"]["devices"] else "cpu"]
        for name, each in facts.items()
        if "error" not in each["torch"]  # which is said, and would be said again
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, names in wanted.items() if not names}
    busy = [host for host in hosts if wanted.get(host.name)]
    if not busy:
        return found
    if build:
        report("building ops; this takes some minutes on each host, all at the same time")
    seconds = BUILD_SECONDS if build else TORCH_SECONDS

    def ask(host: Host) -> dict[str, Any]:
        device = "cuda" if facts[host.name]["torch"]["devices"] else "cpu"
        arguments = ["build" if build else "examine", device, json.dumps(wanted[host.name])]
        return {"module": "ds_trainer.doctor.ops", "arguments": arguments, "seconds": seconds}

    for name, answer in ask_all(busy, "run_module", seconds + 30, ask).items():
        if "ops" in answer:
            found[name] = answer["ops"]
        else:
            found[name] = [{"op": "ops", "failed": f"the ops cannot be examined: {answer['error']}"}]
    return found


def _checkpoint(resolved: Resolved | None) -> tuple[tuple[int, str] | None, str]:
    """The size of a checkpoint, or why it is not known."""
    if resolved is None:
        return None, "no --config"
    model = resolved.settings.model
    place = model.config if isinstance(model.config, str) else model.path
    if not isinstance(model.config, dict) and not Path(str(place)).exists():
        return None, f"{place} is not on this machine"
    from ds_trainer.model.tokenizer import first_line

    # What transformers and peft warn of concerns the run, not the count; this is a thread, so that nothing else may be hushed.
    warnings.simplefilter("ignore")
    try:
        return checkpoint_bytes(resolved), ""
    except Exception as error:  # a model of its own code may raise anything; the rest of the examination goes on
        return None, first_line(error)


def _with_collectives(evidence: Evidence, wishes: Wishes, hosts: list[Host], report: Report) -> Evidence:
    """The evidence with what came of the collectives, or why they were not run."""
    in_the_way = [each for each in judge(evidence) if each.verdict == "fail" and each.check in BEFORE_COLLECTIVES]
    if not wishes.collectives:
        reason = "--no-collectives"
    elif evidence.world_size == 1:
        reason = "one device has nobody to exchange with"
    elif in_the_way:
        reason = f"they would fail or hang until {in_the_way[0].check} on {in_the_way[0].host} is mended"
    else:
        reason = ""
    if reason:
        return replace(evidence, no_collectives=reason)
    report(f"running collectives over {evidence.world_size} ranks")
    first = {host.name: evidence.hosts_by_rank.index(host.name) for host in hosts}
    answers = ask_all(
        hosts,
        "run_ranks",
        COLLECTIVE_SECONDS + wishes.seconds,
        lambda host: {
            "module": "ds_trainer.doctor.collectives",
            "arguments": [str(COLLECTIVE_SECONDS / 2)],
            "first_rank": first[host.name],
            "count": evidence.hosts_by_rank.count(host.name),
            "world_size": evidence.world_size,
            "address": "127.0.0.1" if evidence.alone else evidence.master,
            "port": _free_port(evidence),
            "seconds": COLLECTIVE_SECONDS,
        },
    )
    failed = [each for answer in answers.values() for each in answer["failed"]]
    failed += [[first[host.name], host.lost] for host in hosts if host.lost]
    answer = answers.get(hosts[0].name, {}).get("answer") if not failed else None
    return replace(evidence, collectives={"answer": answer, "failed": failed})


def _free_port(evidence: Evidence) -> int:
    """Where the ranks meet: at the port that was asked for, or on this machine alone at the next free one, as torchrun does."""
    facts = evidence.hosts[0].facts
    owner = facts["port_owner"] if facts else None
    return int(owner["free"]) if owner and owner["free"] else evidence.port
