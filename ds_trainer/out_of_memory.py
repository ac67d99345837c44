"""Out of memory, explained: what the step was, what holds the memory, what to change first."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ds_trainer.arguments.engine_config import offload_device, zero_stage
from ds_trainer.assemble import Prepared
from ds_trainer.errors import OutOfMemoryError
from ds_trainer.monitor import memory


@contextmanager
def explained_memory(prepared: Prepared) -> Iterator[list[int]]:
    """Say what holds the memory, and what to change, when there is not enough inside. Any rank may meet it alone.

    Yields:
        What `parameter_counts` tells goes in here, as soon as there is a model.

    Raises:
        OutOfMemoryError: instead of what torch or Python raises.
    """
    counts: list[int] = []
    try:
        yield counts
    except Exception as error:
        if not memory.ran_out(error):
            raise
        raise OutOfMemoryError(out_of_memory(prepared, counts, str(error))) from error


def out_of_memory(prepared: Prepared, counts: list[int], said: str) -> str:
    """What to say when memory runs out on this rank: the shape of the batch, what is held, the settings to change first."""
    settings, batch = prepared.resolved.settings, prepared.batch
    stage, seq_len = zero_stage(prepared.resolved), settings.data.seq_len
    ranks = prepared.launch.world_size
    offload_optimizer = offload_device(prepared.resolved, "offload_optimizer") != "none"
    offload_param = offload_device(prepared.resolved, "offload_param") != "none"
    held = "the model was not yet built"
    if counts:
        states = memory.states_bytes(
            parameters=counts[0],
            trained=counts[1],
            precision=settings.train.precision,
            stage=stage,
            ranks=ranks,
            offload_optimizer=offload_optimizer,
            offload_param=offload_param,
        )
        held = "of that by count " + ", ".join(f"{name} {size / memory.GIB:.2f} GiB" for name, size in states.items())
    changes = memory.what_to_change(
        micro_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        seq_len=seq_len,
        gradient_checkpointing=settings.model.gradient_checkpointing,
        stage=stage,
        ranks=ranks,
        offload_optimizer=offload_optimizer,
        offload_param=offload_param,
        device_type=prepared.device.type,
    )
    return "\n".join(
        [
            f"out of memory on {prepared.device} of {socket.gethostname()}, with micro_batch_size x seq_len = "
            f"{batch.micro_batch_size} x {seq_len} positions a forward at ZeRO stage {stage} on {ranks} ranks.",
            f"Held by this rank: {memory.measured(prepared.device)}; {held}. The rest is activations and buffers.",
            "Change one of these, the first ones first:",
            *(f"  {each}" for each in changes),
            f"({said.splitlines()[0][:300] if said else 'MemoryError'})",
        ]
    )
