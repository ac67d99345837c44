"""What a run is planned for: nodes, ranks, and how much memory each has. Sizes as people write them. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
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
        found = f"{self.nodes} {'node' if self.nodes == 1 else 'nodes'} x {self.ranks_per_node} {kind}"
        found += "s" if self.ranks_per_node > 1 else ""
        found += f" of {in_words(self.device_bytes)}" if self.device_bytes is not None else ""
        of_a_node = {"host memory": self.host_bytes, "nvme": self.nvme_bytes}
        return ", ".join([found, *(f"{in_words(size)} {name} a node" for name, size in of_a_node.items() if size is not None)])


def asked_cluster(
    *,
    nodes: int,
    gpus: int | None,
    cpu_ranks: int | None,
    gpu_memory: str | None,
    host_memory: str | None,
    nvme: str | None,
    visible: int,
    here: Callable[[], tuple[float | None, float]],
) -> tuple[Cluster, list[str]]:
    """The cluster that the options describe; what they leave out is what this machine has.

    Args:
        nodes: `--nodes`.
        gpus: `--gpus`, of each node.
        cpu_ranks: `--cpu-ranks`, of each node: a plan for training on the CPU.
        gpu_memory: `--gpu-memory`, of each GPU.
        host_memory: `--host-memory`, of each node.
        nvme: `--nvme`, of each node.
        visible: GPUs this process may use.
        here: memory of a GPU of this machine, if it has one, and of its host; asked only where an option leaves it open.

    Returns:
        The cluster, and a line for each thing that was taken from this machine.

    Raises:
        RefusedError: options that contradict each other, or a size that is none.
    """
    if gpus is not None and cpu_ranks is not None:
        raise RefusedError("--gpus and --cpu-ranks contradict each other: a run computes on GPUs or on CPUs. Leave one out.")
    notes = []
    looks = gpus is None and cpu_ranks is None
    if looks and visible:
        gpus = visible
        notes.append(f"planned for the {visible} GPUs seen here; --gpus says otherwise")
    elif looks:
        cpu_ranks = 1
        notes.append("no GPU is seen here: planned for 1 rank on the CPU; write --gpus 8, or --cpu-ranks 2")
    if cpu_ranks is not None and gpu_memory is not None:
        raise RefusedError("--gpu-memory needs --gpus: no GPU is planned for. Add for example --gpus 8.")
    sizes = {
        option: size_of(text, option) if text is not None else None
        for option, text in (("--gpu-memory", gpu_memory), ("--host-memory", host_memory), ("--nvme", nvme))
    }
    device_bytes, host_bytes = sizes["--gpu-memory"], sizes["--host-memory"]
    if looks and (host_bytes is None or (gpus and device_bytes is None)):
        gpu_here, host_here = here()
        if host_bytes is None:
            host_bytes = int(host_here)
            notes.append(f"host memory is this machine's, {in_words(host_here)}; --host-memory says otherwise")
        if gpus and device_bytes is None and gpu_here is not None:
            device_bytes = int(gpu_here)
            notes.append(f"GPU memory is that of the GPU seen here, {in_words(gpu_here)}; --gpu-memory says otherwise")
    return (
        Cluster(
            nodes=nodes,
            ranks_per_node=gpus or cpu_ranks or 1,
            device_type="cuda" if gpus else "cpu",
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            nvme_bytes=sizes["--nvme"],
        ),
        notes,
    )


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
            close = [
                each for each in _UNITS if each.lower() in (match[2].lower(), f"{match[2].lower()}b", f"{match[2].lower()}ib")
            ]
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
