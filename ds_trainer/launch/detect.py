"""Find out who started this process; accept only deepspeed or torchrun."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import eq, le, lt
from typing import Literal

from ds_trainer.errors import LauncherError
from ds_trainer.launch.commands import Commands
from ds_trainer.launch.starters import CORE, STARTERS, Starter, identify, matching

RELATIONS = (
    ("RANK", lt, "WORLD_SIZE"),
    ("LOCAL_RANK", le, "RANK"),
    ("LOCAL_RANK", lt, "LOCAL_WORLD_SIZE"),
    ("LOCAL_RANK", lt, "LOCAL_SIZE"),
    ("LOCAL_WORLD_SIZE", le, "WORLD_SIZE"),
    ("LOCAL_SIZE", le, "WORLD_SIZE"),
    ("GROUP_RANK", lt, "GROUP_WORLD_SIZE"),
    ("GROUP_WORLD_SIZE", le, "WORLD_SIZE"),
    ("CROSS_RANK", lt, "CROSS_SIZE"),
    ("CROSS_SIZE", le, "WORLD_SIZE"),
    ("ROLE_RANK", eq, "RANK"),
    ("ROLE_WORLD_SIZE", eq, "WORLD_SIZE"),
)
"""What holds between the variables of any accepted launch. Nodes may differ in size, so no product is among them."""

BROKEN = {lt: "is not below", le: "is above", eq: "is not"}
"""The words for a relation that does not hold."""

NODE_VARIABLES = {
    "torchrun": ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    "deepspeed": ("LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
}
"""Where each accepted launcher says local_world_size, node_rank and node_count."""

STALE = (
    *(*CORE, "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_*", "TORCHELASTIC_*", "PET_*"),
    *("LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "ACCELERATE_*"),
    *("OMPI_COMM_WORLD_*", "MV2_COMM_WORLD_*", "PMI_*", "PMIX_*", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""What one process alone must not inherit: DeepSpeed stops at OMPI_COMM_WORLD_LOCAL_RANK, transformers and accelerate
obey ACCELERATE_*. SLURM_* and RAY_* stay: no library here takes its rank from them."""

NO_MARKS = ("ACCELERATE_LOG_LEVEL",)
"""Settings that only look like a launcher's mark."""

DEFAULT_COMMANDS = Commands()

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|KEY|CREDENTIAL")
_MAX_SHOWN = 8
_MAX_VALUE_LENGTH = 40
_MAX_DIGITS = 9
_WIDTH = 100


class OneRankError(LauncherError):
    """A refusal that concerns this rank alone: the others may have nothing to say, so each rank prints its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Where this process sits in the job. Ranks count from 0."""

    launcher: Literal["deepspeed", "torchrun", "debug"]
    """Who set the ranks; `debug` is one process without a launcher."""
    rank: int
    """Position among all processes, 0 <= rank < world_size."""
    local_rank: int
    """Position among the processes of this node, 0 <= local_rank < local_world_size."""
    world_size: int
    """Processes in the job."""
    local_world_size: int
    """Processes on this node; nodes may differ."""
    node_rank: int
    """Position of this node among the nodes, 0 <= node_rank < node_count."""
    node_count: int
    """Nodes in the job."""
    master_addr: str
    """Host name or address where the processes meet."""
    master_port: int
    """TCP port there, 1 to 65535."""
    restarts: bool = False
    """Whether the launcher starts all ranks again when one leaves with an error: `torchrun --max-restarts`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleProcess:
    """How `debug` prepares its environment: the caller deletes `remove`, then writes `assign`."""

    launch: Launch
    """The launch that results."""
    remove: tuple[str, ...]
    """Variables of launchers that are set and not in `assign`."""
    assign: Mapping[str, str]
    """The five variables that DeepSpeed needs."""


def detect_launch(environ: Mapping[str, str], *, commands: Commands = DEFAULT_COMMANDS) -> Launch:
    """Read the launcher's variables; change nothing. An empty value counts as unset.

    Args:
        environ: usually `os.environ` as the process found it: DeepSpeed adds to it when it is imported.
        commands: what the user asked for, to be shown under an accepted launcher.

    Raises:
        LauncherError: no accepted launcher left its marks, or two did.
        OneRankError: an accepted launcher did, but its variables are incomplete or contradict each other.
    """
    variables = _meaningful(environ)
    starter = identify(variables)
    problems = _contradictions(variables, starter.sets)
    if starter.launcher is None:
        headline = f"This process was {starter.words}."
        raise LauncherError(_refusal(headline, starter, variables, problems, commands))
    if problems:
        headline = f"This process was {starter.words}, but its variables are incomplete or contradict each other."
        raise OneRankError(_refusal(headline, starter, variables, problems, commands))
    local_world_size, node_rank, node_count = (int(variables[name]) for name in NODE_VARIABLES[starter.launcher])
    return Launch(
        launcher=starter.launcher,
        rank=int(variables["RANK"]),
        local_rank=int(variables["LOCAL_RANK"]),
        world_size=int(variables["WORLD_SIZE"]),
        local_world_size=local_world_size,
        node_rank=node_rank,
        node_count=node_count,
        master_addr=variables["MASTER_ADDR"],
        master_port=int(variables["MASTER_PORT"]),
        restarts=variables.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0",
    )


def check_local_rank_argument(launch: Launch, value: int | None) -> None:
    """Hold `--local_rank=N`, which `deepspeed` puts before the user's arguments, against LOCAL_RANK.

    Raises:
        OneRankError: they differ, so the argument was not written by the launcher that started this process.
    """
    if value is not None and value != launch.local_rank:
        raise OneRankError(
            f"--local_rank={value} on the command line contradicts LOCAL_RANK={launch.local_rank} "
            f"on rank {launch.rank}.\nThe launcher alone numbers its workers: leave --local_rank out of the command."
        )


def single_process(environ: Mapping[str, str], *, port: int, commands: Commands = DEFAULT_COMMANDS) -> SingleProcess:
    """Work out the environment of `debug`: one process, whatever a launcher of one left in it. Writes nothing.

    Args:
        environ: usually `os.environ`.
        port: a free TCP port for the process group of one.
        commands: what the user asked for.

    Raises:
        LauncherError: a launcher started this process as one of several.
    """
    variables = _meaningful(environ)
    for starter in STARTERS:
        count = _process_count(variables, starter) if starter.applies(variables) else 1
        if count > 1:
            raise LauncherError(
                _message(
                    headline=f"`debug` is one process, but this one was {starter.words} with {count} processes.",
                    found=_found(variables, starter),
                    reasons=[f"{count} copies of a run would write to the same run folder."],
                    commands={
                        "If you typed this in a shell of that job, first:": [_unset(variables, starter)],
                        "Start it without a launcher:": [commands.debug()],
                    },
                )
            )
    launch = Launch(
        launcher="debug",
        rank=0,
        local_rank=0,
        world_size=1,
        local_world_size=1,
        node_rank=0,
        node_count=1,
        master_addr="127.0.0.1",
        master_port=port,
    )
    assign = dict(zip(CORE, ("0", "0", "1", launch.master_addr, str(port)), strict=True))
    remove = [name for name in matching(environ, STALE) if name not in assign and name not in NO_MARKS]
    return SingleProcess(launch=launch, remove=tuple(remove), assign=assign)


def prints_refusal(error: LauncherError, environ: Mapping[str, str]) -> bool:
    """Whether this process is the one that prints the refusal, so that it appears once and not once a rank.

    True in doubt: a refusal printed twice is a nuisance, one that nobody prints is a riddle. A bare RANK does not
    count, since it may be left over in the shell.
    """
    if isinstance(error, OneRankError):
        return True
    variables = _meaningful(environ)
    ranks = (starter.rank for starter in STARTERS if starter.rank and starter.applies(variables))
    return not _number(variables.get(next(ranks, ""), ""))


def _meaningful(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if value.strip() and name not in NO_MARKS}


def _number(text: str) -> int | None:
    """A count or a rank; int() alone would also take ' 1', '+1', '1_0' and digits of other scripts."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


def _process_count(variables: Mapping[str, str], starter: Starter) -> int:
    texts = [variables[name] for name in starter.sizes if name in variables]
    return (_number(texts[0]) if texts else None) or 1


def _contradictions(variables: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """What is wrong with the variables that a launcher should have set, in words."""
    missing = [name for name in names if name not in variables]
    problems = [f"{', '.join(missing)} missing"] if missing else []
    numbers: dict[str, int] = {}
    for name in names:
        if name in variables and name != "MASTER_ADDR":
            number = _number(variables[name])
            if number is None:
                problems.append(f"{_shown(name, variables[name])} is not a whole number from 0 on")
            else:
                numbers[name] = number
    if not 1 <= numbers.get("MASTER_PORT", 1) <= 65535:
        problems.append(f"MASTER_PORT={numbers['MASTER_PORT']} is not between 1 and 65535")
    for left, holds, right in RELATIONS:
        if left in numbers and right in numbers and not holds(numbers[left], numbers[right]):
            problems.append(f"{left}={numbers[left]} {BROKEN[holds]} {right}={numbers[right]}")
    return problems


def _refusal(headline: str, starter: Starter, variables: Mapping[str, str], problems: Sequence[str], commands: Commands) -> str:
    where = "Start it with one of:"
    if not commands.device_count:
        where = f"Start it with one of ({commands.process_count} processes as an example, no GPU was counted here):"
    sections = {where: [command(commands) for command in starter.commands]}
    if starter.leftover:
        sections = {"If they are left over in this shell, first:": [_unset(variables, starter)], **sections}
    reasons = [f"At fault: {'; '.join(problems)}."] if problems else []
    return _message(headline=headline, found=_found(variables, starter), reasons=[*reasons, starter.rule], commands=sections)


def _message(*, headline: str, found: str, reasons: Sequence[str], commands: Mapping[str, Sequence[str]]) -> str:
    """Prose wrapped for a terminal; commands each on a line of their own, to be copied whole."""
    lines = [line for text in (headline, found, *reasons) for line in _wrapped(text)]
    for introduction, block in commands.items():
        lines += [introduction, *(f"  {command}" for command in block)]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _found(variables: Mapping[str, str], starter: Starter) -> str:
    names = matching(variables, starter.shows)[:_MAX_SHOWN]
    return "Found: " + (", ".join(_shown(name, variables[name]) for name in names) or "no variable of any launcher.")


def _shown(name: str, value: str) -> str:
    """`NAME=value` as it may stand in a log: printable, short, without secrets."""
    if _SECRET.search(name):
        return f"{name}=(hidden)"
    text = ascii(value)[1:-1]
    return f"{name}={text}" if len(text) <= _MAX_VALUE_LENGTH else f"{name}={text[:_MAX_VALUE_LENGTH]}..."


def _unset(variables: Mapping[str, str], starter: Starter) -> str:
    return shlex.join(["unset", *matching(variables, starter.shows)])
