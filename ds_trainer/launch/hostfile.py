"""Read the hostfile of `deepspeed --hostfile`, more strictly than DeepSpeed does."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from ds_trainer.errors import ArgumentsError, Problem

MAX_SLOTS = 64
"""More devices than any host has; a larger number is a slip."""

_LINE = re.compile(r"(?P<name>\S+)(?:\s+(?P<slots>\S.*))?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?)*\.?")
_SLOTS = re.compile(r"slots=([0-9]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSlots:
    """One line of a hostfile."""

    name: str
    """What ssh and pdsh are given: a host name, an alias of ssh's config, or an IPv4 address."""
    slots: int
    """Processes to start there, one a device."""
    line: int
    """Where it stands in the file, from 1."""


def read_hostfile(path: Path) -> tuple[HostSlots, ...]:
    """The hosts in the order of their node ranks.

    DeepSpeed 0.19.8 (launcher/runner.py `fetch_hostfile`) trains on this machine alone when the file is missing, reads
    `slots=8garbage` as 8, and hands whatever stands first in a line to ssh, options included.

    Raises:
        ArgumentsError: every line that is not `NAME slots=N`, or a file that names no host.
    """
    if path.exists() and not path.is_file():
        raise _refused(
            str(path), "is no file. Name one with a line `NAME slots=N` for each host, as in hostfiles/two_nodes.hostfile."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _refused(
            str(path),
            f"cannot be read ({error.strerror}), and `deepspeed` would train on this machine alone. Write one, a line "
            "`NAME slots=N` for each host, or leave --hostfile out for this machine.",
        ) from None
    except UnicodeDecodeError as error:
        raise _refused(
            str(path), f"is no text: byte {error.start} is not UTF-8. Write a line `NAME slots=N` for each host."
        ) from None
    hosts: dict[str, HostSlots] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        found = _LINE.fullmatch(content)
        assert found is not None  # any text without blanks at its ends matches
        name, slots = found["name"], found["slots"]
        wrong = _wrong_name(name) or _wrong_slots(name, slots)
        if not wrong and name in hosts:
            wrong = f"{name} stands in line {hosts[name].line} already. A host has one line, with all its slots."
        if wrong:
            problems.append(Problem(where=f"{path}:{number}", what=wrong))
        else:
            hosts[name] = HostSlots(name=name, slots=int(slots.removeprefix("slots=")), line=number)
    if problems:
        raise ArgumentsError(problems)
    if not hosts:
        raise _refused(str(path), "names no host. Write one a line, such as `node1 slots=8`.")
    return tuple(hosts.values())


def _wrong_name(name: str) -> str | None:
    if _NAME.fullmatch(name):
        return None
    if name.startswith("-"):
        return (
            f"`{name}` is no host name: ssh would take it as an option. Write a name that ssh knows, such as `node1 slots=8`."
        )
    if "@" in name:
        user, _, host = name.partition("@")
        return f"`{name}`: the user belongs into ssh's config (`Host {host}`, `User {user}`), here stands `{host}` alone."
    if "[" in name or "," in name:
        return f"`{name}` is not expanded by DeepSpeed. Write one line a host."
    if re.fullmatch(r"[^:]+:\d+", name):
        host, _, port = name.partition(":")
        return f"`{name}`: the port belongs into ssh's config (`Host {host}`, `Port {port}`) or to `deepspeed --ssh_port`."
    return f"`{name}` is no host name: letters, digits, `.`, `-` and `_` make one. Write for example `node1 slots=8`."


def _wrong_slots(name: str, slots: str | None) -> str | None:
    if slots is None:
        return f"how many processes run on {name}? Write `{name} slots=8`."
    found = _SLOTS.fullmatch(slots)
    if found is None:
        digits = re.search(r"[0-9]+", slots)
        key = re.match(r"[A-Za-z]+", slots)
        near = bool(key and difflib.get_close_matches(key[0], ["slots", "slot", "gpus", "max_slots"]))
        number = digits[0] if digits and near else "8"
        return f"`{slots}` is not `slots=N` with a whole number and nothing after it. Write `{name} slots={number}`."
    if found[1].startswith("0") and 1 <= int(found[1]) <= MAX_SLOTS:
        return f"`{slots}` begins with a zero. Write `{name} slots={int(found[1])}`."
    if not 1 <= int(found[1]) <= MAX_SLOTS:
        return f"`{slots}`: a host runs 1 to {MAX_SLOTS} processes, one a device. Leave out a line for a host that runs none."
    return None


def _refused(where: str, what: str) -> ArgumentsError:
    return ArgumentsError([Problem(where=where, what=what)])
