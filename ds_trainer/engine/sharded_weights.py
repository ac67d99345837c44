"""Load safetensors under ZeRO-3 so that no rank ever holds the whole model: each rank reads its own slice of each tensor.

transformers reads the whole file on rank zero, makes every parameter whole on every rank and shards it again. Here a rank
copies just the part of the file that it will keep. Source of the layout: deepspeed/runtime/zero/partition_parameters.py
(0.19.8), where `param.ds_tensor` holds elements [rank * n, rank * n + n) of the flattened parameter, n = ds_tensor.ds_numel.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_trainer import whereabouts


def reason_against(model: nn.Module, files: list[Path], config: dict[str, Any], new: str | None = None) -> str | None:
    """Why the sliced loader cannot be used for these files, or None when it can.

    Args:
        model: constructed under ZeRO-3, so sharded.
        files: the safetensors files of a model folder.
        config: the DeepSpeed config.
        new: a parameter that the files may lack.
    """
    from safetensors import safe_open

    zero = config["zero_optimization"]
    if not files:
        return "the model has no local safetensors files"
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        return "parameters are offloaded to nvme"
    if zero.get("zero_hpz_partition_size", 1) > 1:
        return "zero_hpz_partition_size keeps a second set of shards"
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            shapes |= {name: reader.get_slice(name).get_shape() for name in reader.keys()}  # noqa: SIM118
    wanted = {name: list(parameter.ds_shape) for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]
    for name, shape in wanted.items():
        if name not in shapes and name == new:
            continue
        if name not in shapes:
            return f"{name} is not in the files by that name"
        if shapes[name] != shape:
            return f"{name} has shape {shapes[name]} in the files and {shape} in the model"
    return None


def load_sharded(model: nn.Module, files: list[Path], rank: int) -> set[str]:
    """Copy this rank's slice of every parameter from the files, and every saved buffer whole. No collective.

    Args:
        model: constructed under ZeRO-3; `reason_against` returned None for it.
        files: the safetensors files of a model folder.
        rank: position in the data-parallel group.

    Returns:
        The parameters that the files lack.
    """
    from safetensors import safe_open

    parameters: dict[str, Any] = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    missing = set(parameters)
    with ExitStack() as stack, torch.no_grad():
        for file in files:
            reader = stack.enter_context(safe_open(file, framework="pt"))
            for name in reader.keys():  # noqa: SIM118 - not a dict
                whereabouts.at("loading weights")
                missing.discard(name)
                if name in parameters:
                    shard = parameters[name].ds_tensor
                    start = rank * shard.ds_numel
                    values = _flat_slice(reader.get_slice(name), start, start + shard.ds_numel)
                    shard.data.view(-1)[: values.numel()].copy_(values)
                elif name in buffers:
                    buffers[name].copy_(reader.get_tensor(name))
    return missing


def _flat_slice(tensor: Any, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a flattened tensor in a file, reading only the rows they lie in."""
    shape = tensor.get_shape()
    stop = min(stop, math.prod(shape))
    if start >= stop:
        return torch.empty(0)
    if not shape:
        return tensor[...].reshape(-1)  # type: ignore[no-any-return]
    row = math.prod(shape[1:])
    first = start // row
    rows = tensor[first : -(-stop // row)].reshape(-1)
    return rows[start - first * row : stop - first * row]  # type: ignore[no-any-return]
