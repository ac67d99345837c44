"""Out of memory: recognise it, and measure what a process holds."""

from __future__ import annotations

import errno
import os
import re

import torch

_WORDS = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)
GIB = 2**30


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no more memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None
    )


def measured(device: torch.device) -> str:
    """What this process holds now, and of how much, in words."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        held, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.memory_reserved(device)
        return (
            f"torch holds {held / GIB:.2f} GiB of the GPU's {total / GIB:.2f} GiB now, held {most / GIB:.2f} GiB at most, "
            f"and has reserved {reserved / GIB:.2f} GiB"
        )
    page = os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * page
    return f"this process holds {resident / GIB:.2f} GiB of the host's {os.sysconf('SC_PHYS_PAGES') * page / GIB:.2f} GiB"
