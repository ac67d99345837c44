"""Make a run for a cluster fit the machine `debug` runs on, and say what that changes. `train` does none of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_trainer.arguments.engine_config import offload_device, optimizer_kind
from ds_trainer.arguments.merge import Resolved
from ds_trainer.engine.build import prepare_deepspeed, require_precision
from ds_trainer.engine.offload import why_not
from ds_trainer.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class Lowered:
    """A setting that cannot be kept here."""

    settings: tuple[str, ...]
    """What takes its place, as one would write it on the command line."""
    why: str
    """The rest of a sentence that begins with the settings."""

    def __str__(self) -> str:
        return f"LOWERED for this machine: {' '.join(self.settings)}, since {self.why}"


def lowered(resolved: Resolved, device_type: str) -> list[Lowered]:
    """What of a run this machine cannot do, and what is run instead; empty when it can do all of it.

    Args:
        resolved: the settings as they were written.
        device_type: `cuda` or `cpu`.
    """
    import torch

    prepare_deepspeed(torch.device(device_type), 1)
    return [*_precision(resolved), *_attention(resolved, device_type), *_engine(resolved, device_type)]


def _precision(resolved: Resolved) -> Iterator[Lowered]:
    settings = resolved.settings
    try:
        require_precision(settings.train.precision)
    except ModelError:
        dtype = ["model.dtype=float32"] if settings.model.dtype else []
        why = f"it does not compute in {settings.train.precision}; losses agree within the rounding of that type"
        yield Lowered(settings=("train.precision=fp32", *dtype), why=why)


def _attention(resolved: Resolved, device_type: str) -> Iterator[Lowered]:
    asked = resolved.settings.model.attention
    if asked.startswith("flash") and (device_type == "cpu" or importlib.util.find_spec("flash_attn") is None):
        yield Lowered(settings=("model.attention=auto",), why=f"{asked} needs a GPU and the package flash-attn")
    elif asked == "flex_attention" and device_type == "cpu":
        yield Lowered(settings=("model.attention=auto",), why="flex_attention computes no gradients on a CPU")


def _engine(resolved: Resolved, device_type: str) -> Iterator[Lowered]:
    zero = "zero_optimization"
    for what in ("offload_optimizer", "offload_param"):
        if offload_device(resolved, what) == "nvme":  # type: ignore[arg-type]
            path = resolved.deepspeed.find(f"{zero}.{what}.nvme_path")
            folder = Path(str(path.value)) if path else Path()
            missing = None if folder.is_dir() else f"{folder} ({path.origin if path else ''}) is not here"
            if why := missing or why_not("async_io"):
                yield Lowered(settings=(f"deepspeed.{zero}.{what}.device=cpu",), why=why)
    kind = optimizer_kind(resolved, device_type)
    if kind in ("cpu_adam", "fused_adam") and (why := why_not(kind)):
        torch_adam = ("deepspeed.optimizer.type=AdamW", "deepspeed.optimizer.params.torch_adam=true")
        yield Lowered(settings=torch_adam, why=why)
    hpz = resolved.deepspeed.find(f"{zero}.zero_hpz_partition_size")
    if hpz is not None and hpz.value not in (None, 1):
        why = "one process has no second copy of the weights to keep"
        yield Lowered(settings=(f"deepspeed.{zero}.zero_hpz_partition_size=1",), why=why)
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        quantized = resolved.deepspeed.find(f"{zero}.{name}")
        if quantized is not None and quantized.value is True:
            why = "one process sends nothing that could be quantized; losses agree within that rounding"
            yield Lowered(settings=(f"deepspeed.{zero}.{name}=false",), why=why)
