"""Out of memory, explained: what the step was, what holds the memory, what to change first."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ds_trainer.assemble import Prepared
from ds_trainer.errors import OutOfMemoryError
from ds_trainer.model import quantize
from ds_trainer.monitor import memory
from ds_trainer.plan.advice import single_changes
from ds_trainer.plan.holding import holding_of
from ds_trainer.plan.memory import states_of


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
    settings, batch, launch = prepared.resolved.settings, prepared.batch, prepared.launch
    seq_len = settings.data.seq_len
    holding = holding_of(
        prepared.resolved,
        prepared.engine_config,
        batch,
        ranks_per_node=launch.local_world_size,
        device_type=prepared.device.type,
    )
    held = "the model was not yet built"
    if counts:
        total, trained, packed = counts
        elements = total - packed + quantize.elements(packed, holding.weight_bytes)
        states = states_of(holding, parameters=elements, trained=trained)
        held = "of that by count " + ", ".join(f"{name} {size / memory.GIB:.2f} GiB" for name, size in states.items())
    changes = [" ".join(each.settings) for each in single_changes(batch, holding)][:3]
    changes += [f"data.seq_len={max(1, seq_len // 2)}", "a smaller model, or more ranks"][: 3 - len(changes)]
    return "\n".join(
        [
            f"out of memory on {prepared.device} of {socket.gethostname()}, with micro_batch_size x seq_len = "
            f"{batch.micro_batch_size} x {seq_len} positions a forward at ZeRO stage {holding.stage} on {holding.ranks} ranks.",
            f"Held by this rank: {memory.measured(prepared.device)}; {held}. The rest is activations and buffers.",
            "Change one of these, the first ones first (`ds_trainer plan` says by how much each helps):",
            *(f"  {each}" for each in changes),
            f"({said.splitlines()[0][:300] if said else 'MemoryError'})",
        ]
    )
