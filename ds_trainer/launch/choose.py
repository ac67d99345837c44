"""Choose the command that starts a run on what can be seen: a hostfile, a SLURM job, the devices of this machine."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ds_trainer.errors import RefusedError
from ds_trainer.launch.commands import Commands
from ds_trainer.launch.hostfile import HostSlots, read_hostfile

LauncherName = Literal["torchrun", "deepspeed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How to start a run."""

    seen: str
    """What the choice was made from."""
    commands: tuple[str, ...]
    """To type: one, or one for each host where they differ."""
    where: str
    """Where to type them."""
    world_size: int
    """Ranks that they start."""


def choose_command(
    commands: Commands,
    environ: Mapping[str, str],
    *,
    hostfile: Path | None = None,
    launcher: LauncherName | None = None,
) -> Choice:
    """The command for what is seen: the hostfile if there is one, else the SLURM job, else this machine's devices.

    Args:
        commands: what to run, and the devices of this machine.
        environ: usually `os.environ`.
        hostfile: of `deepspeed --hostfile`.
        launcher: one of the two, where both could do it; by default `deepspeed` with a hostfile, else `torchrun`.

    Raises:
        ArgumentsError: the hostfile is wrong.
        RefusedError: what was asked for cannot be started from here.
    """
    if hostfile is not None:
        hosts = read_hostfile(hostfile)
        return _torchrun_hosts(commands, hosts) if launcher == "torchrun" else _deepspeed_hosts(commands, hosts, hostfile)
    if environ.get("SLURM_JOB_ID"):
        return _slurm(commands, environ, launcher)
    processes = _counted(commands.process_count, "process", "processes")
    devices = _counted(commands.device_count or 0, "GPU", "GPUs")
    if commands.device_count and "CUDA_VISIBLE_DEVICES" in environ:
        devices += f" (CUDA_VISIBLE_DEVICES = {environ['CUDA_VISIBLE_DEVICES']})"
    return Choice(
        seen=f"this machine with {devices}" + ("" if commands.device_count else f": {processes} on the CPU, as an example"),
        commands=(commands.deepspeed() if launcher == "deepspeed" else commands.torchrun(),),
        where="on this machine",
        world_size=commands.process_count,
    )


def _deepspeed_hosts(commands: Commands, hosts: Sequence[HostSlots], hostfile: Path) -> Choice:
    if shutil.which("pdsh") is None and len(hosts) > 1:
        raise RefusedError(
            "`deepspeed --hostfile` reaches several hosts through pdsh, which is not installed here. Install it (Debian and "
            "Ubuntu: apt-get install pdsh), or start torchrun on each host: add --launcher torchrun to this command."
        )
    return Choice(
        seen=_seen(hosts, hostfile=hostfile),
        commands=(commands.deepspeed_hosts(str(hostfile), through_pdsh=len(hosts) > 1),),
        where="on one of the hosts; ds_trainer, the run file and the data lie at the same paths on all",
        world_size=sum(host.slots for host in hosts),
    )


def _torchrun_hosts(commands: Commands, hosts: Sequence[HostSlots]) -> Choice:
    each = [dataclasses.replace(commands, device_count=host.slots).torchrun_nodes(len(hosts), hosts[0].name) for host in hosts]
    alike = len(set(each)) == 1
    return Choice(
        seen=_seen(hosts),
        commands=(each[0],) if alike else tuple(f"{line}    # on {host.name}" for line, host in zip(each, hosts, strict=True)),
        where=f"on every host: {', '.join(host.name for host in hosts)}",
        world_size=sum(host.slots for host in hosts),
    )


def _slurm(commands: Commands, environ: Mapping[str, str], launcher: LauncherName | None) -> Choice:
    if launcher == "deepspeed":
        raise RefusedError(
            "in a SLURM job srun starts torchrun on each node; `deepspeed` knows the nodes from a hostfile alone. "
            "Leave out --launcher, or give --hostfile too."
        )
    nodes = _counted_by_slurm(environ, "SLURM_JOB_NUM_NODES") or _counted_by_slurm(environ, "SLURM_NNODES")
    if nodes is None:
        raise RefusedError(
            f"SLURM_JOB_ID = {environ['SLURM_JOB_ID']}, but SLURM_JOB_NUM_NODES is not set: how many nodes has the job? Run "
            "this in the batch script or in the shell of salloc; where the variable is left over, first: unset SLURM_JOB_ID"
        )
    on_node = _counted_by_slurm(environ, "SLURM_GPUS_ON_NODE")
    commands = dataclasses.replace(commands, device_count=on_node or commands.device_count)
    processes = _counted(commands.process_count, "process", "processes")
    return Choice(
        seen=f"SLURM job {environ.get('SLURM_JOB_ID', '?')} with {_counted(nodes, 'node', 'nodes')}, "
        + (
            f"{_counted(commands.device_count, 'GPU', 'GPUs')} on this one"
            if commands.device_count
            else f"no GPUs: {processes} on the CPU of each, as an example"
        ),
        commands=(commands.srun(),),
        where="in the batch script (scripts/slurm.sbatch is one that saves and requeues in time), or in the shell of salloc",
        world_size=nodes * commands.process_count,
    )


def _counted_by_slurm(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        raise RefusedError(
            f"{name} = {text}: SLURM writes a number from 1 on there. If it is left over in this shell: unset {name}"
        )
    return int(text)


def _seen(hosts: Sequence[HostSlots], hostfile: Path | None = None) -> str:
    processes = _counted(sum(host.slots for host in hosts), "process", "processes")
    return f"{_counted(len(hosts), 'host', 'hosts')}{f' in {hostfile}' if hostfile else ''} with {processes} in all"


def _counted(number: int, one: str, more: str) -> str:
    return f"{number or 'no'} {one if number == 1 else more}"
