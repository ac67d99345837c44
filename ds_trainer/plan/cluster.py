"""What a run is planned for: nodes, ranks, and how much memory each has. Sizes as people write them. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ds_trainer.errors import RefusedError

GIB = 2**30
_UNITS = {
    **{f"{prefix}iB": 2**power for prefix, power in zip("KMGT", (10, 20, 30, 40), strict=True)},
    **{f"{prefix}B": 10**power for prefix, power in zip("kMGT", (3, 6, 9, 12), strict=True)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s?([A-Za-z]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Machines that are all alike."""

    nodes: int
    ranks_per_node: int
    device_type: Literal["cuda", "cpu"]
    """On `cpu` a rank computes in host memory: its device memory is the resident memory of its process."""
    device_bytes: float | None = None
    """Memory of one GPU; None: not said. Always None on `cpu`."""
    host_bytes: float | None = None
    """Memory of one node; None: not said."""
    nvme_bytes: float | None = None
    """Local disk of one node that offload may use; None: not said."""

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        kind = "GPU" if self.device_type == "cuda" else "CPU rank"
        each = f"{self.ranks_per_node} {kind}{'s' if self.ranks_per_node > 1 else ''}"
        found = f"{self.nodes} node{'s' if self.nodes > 1 else ''} x {each}"
        sizes = {" of": self.device_bytes, "host memory": self.host_bytes, "nvme": self.nvme_bytes}
        if self.device_bytes is not None:
            found += f" of {in_words(self.device_bytes)}"
        told = [f"{in_words(size)} {name} a node" for name, size in list(sizes.items())[1:] if size is not None]
        return ", ".join([found, *told])


def size_of(text: str, option: str) -> int:
    """The bytes of a size such as 80GiB, 1.5TiB or 500GB.

    Raises:
        RefusedError: it is no size, or zero; `option` is named.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None or not float(match[1]):
        hint = ""
        if match and unit is None:
            close = [each for each in _UNITS if each.lower() in (match[2].lower(), f"{match[2].lower()}b", f"{match[2].lower()}ib")]
            hint = f" Did you mean {match[1]}{close[-1]}?" if close else ""
        raise RefusedError(
            f"{option} {text!r} is no size: a number above 0 with a unit, KiB MiB GiB TiB (powers of 1024) or kB MB GB TB "
            f"(powers of 1000). Write for example {option} 80GiB.{hint}"
        )
    return int(float(match[1]) * unit)


def in_words(num_bytes: float) -> str:
    """A size with a binary unit, such as "12.3 GiB"."""
    for unit, size in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20)):
        if num_bytes >= size or unit == "MiB":
            value = num_bytes / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    raise AssertionError
