"""Out of memory: recognise it, count what a rank holds, and name what to change first."""

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


def states_bytes(
    *, parameters: int, trained: int, precision: str, stage: int, ranks: int, offload_optimizer: bool, offload_param: bool
) -> dict[str, float]:
    """What the states of the model take on the device of one rank, in bytes; activations and buffers come on top.

    Source: ZeRO (Rajbhandari et al., 2020), section 3.1: a parameter and a gradient in the training type, and for Adam a copy
    and two moments in fp32. Stage 1 splits the optimizer states over the ranks, 2 the gradients too, 3 the parameters too.

    Args:
        parameters: of the model.
        trained: of them, those that are trained.
        precision: `train.precision`.
        stage: ZeRO's.
        ranks: over which they are split.
        offload_optimizer: the optimizer states, and at stage 2 and 3 the gradients, are kept off the device.
        offload_param: so are the parameters.
    """
    each = 4 if precision == "fp32" else 2
    gradients = trained * each / (ranks if stage >= 2 else 1)
    return {
        "parameters": 0.0 if offload_param else parameters * each / (ranks if stage >= 3 else 1),
        "gradients": 0.0 if offload_optimizer and stage >= 2 else gradients,
        "optimizer states": 0.0 if offload_optimizer else trained * 12 / (ranks if stage >= 1 else 1),
    }


def what_to_change(
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    seq_len: int,
    gradient_checkpointing: bool,
    stage: int,
    ranks: int,
    offload_optimizer: bool,
    offload_param: bool,
    device_type: str,
) -> list[str]:
    """The three settings to change first, as one would write them; the first ones leave every update as it is."""
    found = []
    if micro_batch_size > 1:
        divisor = next(each for each in range(2, micro_batch_size + 1) if micro_batch_size % each == 0)
        found.append(
            f"train.micro_batch_size={micro_batch_size // divisor} "
            f"train.gradient_accumulation_steps={gradient_accumulation_steps * divisor}"
        )
    if not gradient_checkpointing:
        found.append("model.gradient_checkpointing=true")
    if stage < 3 and ranks > 1:
        found.append(f"deepspeed.zero_optimization.stage={stage + 1}")
    if device_type != "cpu" and not offload_optimizer:
        found.append("deepspeed.zero_optimization.offload_optimizer.device=cpu")
    if device_type != "cpu" and stage == 3 and not offload_param:
        found.append("deepspeed.zero_optimization.offload_param.device=cpu")
    return [*found, f"data.seq_len={max(1, seq_len // 2)}", "a smaller model, or more ranks"][:3]


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
