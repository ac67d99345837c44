"""What is found out about hosts, and what a check says of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ds_trainer.doctor.needs import Needs
from ds_trainer.launch.choose import LauncherName
from ds_trainer.launch.exports import Exports

Verdict = Literal["ok", "warn", "fail", "skip"]

HERE = "here"
"""Stands for the machine the launcher is started on, where that need not be one of the hosts."""


NO_FOLDER, NO_PYTHON = "no folder ", "no python at "
"""How the reason begins of a host that is reached and cannot start a probe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check says of one host."""

    check: str
    host: str
    verdict: Verdict
    found: str
    rule: str = ""
    """Why that matters."""
    fix: str = ""
    """What to do, with a value that fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostEvidence:
    """What was found on one host. None: not asked, or no answer."""

    name: str
    slots: int
    lost: str | None = None
    """Why it gives no answers (any more)."""
    facts: dict[str, Any] | None = None
    """What `probe.facts` answered."""
    clock: tuple[float, float] | None = None
    """Seconds ahead of this machine, and by how much that may be wrong."""
    reaches: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Other host -> its addresses -> what came of calling them from here (`probe.dial`)."""
    rendezvous: str | None = None
    """What came of calling the rendezvous from here."""
    paths: dict[str, Any] | None = None
    """What `probe.paths` answered."""
    folder: dict[str, Any] | None = None
    """What came of writing into the run folder (`probe.leave_token`)."""
    sees_first: bool | None = None
    """Whether what the first host wrote into the run folder is there."""
    ops: list[dict[str, Any]] | None = None
    """What `engine.offload.examine_op` says of each op the run needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """All that is judged."""

    hosts: tuple[HostEvidence, ...]
    alone: bool = False
    """There is no hostfile: this machine, and no launcher that goes through ssh."""
    launcher: LauncherName = "deepspeed"
    """What would start the run."""
    port: int = 29500
    pdsh: str | None = "ssh"
    """How pdsh can reach hosts, in its own words; None when it is not installed."""
    exports: Exports = field(default_factory=Exports)
    matter: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Variables of this shell that matter -> (what they decide, fingerprint of the value)."""
    leftovers: tuple[str, ...] = ()
    """Variables of this shell that a launcher set."""
    needs: Needs | None = None
    checkpoint: tuple[int, str] | None = None
    """Bytes of one checkpoint and how they were counted."""
    no_checkpoint: str = "there is no --config"
    """Why that is not known."""
    collectives: dict[str, Any] | None = None
    """`answer` of rank zero and `failed` ranks of the run over all hosts."""
    no_collectives: str = ""
    """Why there was none."""

    @property
    def answering(self) -> tuple[HostEvidence, ...]:
        """Hosts with facts."""
        return tuple(host for host in self.hosts if host.facts is not None)

    @property
    def through_pdsh(self) -> bool:
        """Whether the workers are started through pdsh: with one host `deepspeed` starts them itself."""
        return len(self.hosts) > 1 and self.launcher == "deepspeed"

    @property
    def master(self) -> str | None:
        """Where the ranks meet: the address that `deepspeed` would take, or for torchrun the first host's name."""
        return meeting_place(self.launcher, self.hosts[0].name, self.hosts[0].facts)

    @property
    def hosts_by_rank(self) -> list[str]:
        """The host of each rank."""
        return [host.name for host in self.hosts for _ in range(host.slots)]

    @property
    def world_size(self) -> int:
        """Ranks on all hosts."""
        return len(self.hosts_by_rank)


def meeting_place(launcher: LauncherName, first: str, facts: dict[str, Any] | None) -> str | None:
    """Where the ranks meet on the first host; None where `deepspeed` finds no address."""
    if launcher == "torchrun":
        return first
    return facts["first_address"] if facts else None
