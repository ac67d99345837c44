"""The training state of a DeepSpeed engine as slices of named parameters: the same at every stage, number of ranks and offload.

ZeRO lays parameters end to end in flat fp32 partitions, one or more a rank, and the optimizer moves those. Where each piece of
each parameter lies in them differs between the stages; that knowledge is here and nowhere else. Sources (DeepSpeed 0.19.8):
deepspeed/utils/tensor_fragment.py (`param._hp_mapping`, stages 1 and 2 and BF16_Optimizer), deepspeed/runtime/zero/stage3.py
(`fp16_groups`, `fp32_partitioned_groups_flat`, `_rigid_load_state_dict`), deepspeed/runtime/engine.py (`_load_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_trainer import comm
from ds_trainer.errors import CheckpointError

WEIGHTS = "fp32"
"""The kind of slice that holds weights; the other kinds are the optimizer's own words: exp_avg, exp_avg_sq, ..."""
BUFFER = "buffer"
"""The kind of slice that holds a buffer of the model."""

ReadSlice = Callable[[str, str, int, Tensor], bool]
"""(name, kind, start, target) -> whether there is such a state; fills the target (n,) with elements [start, start + n)."""

_STEP_IN_GROUP = ("FusedAdam", "FusedLion")
"""Optimizers that count their steps in the parameter group: deepspeed/ops/adam/fused_adam.py, deepspeed/ops/lion."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements [start, start + numel) of a flattened parameter, which lie at `offset` of a partition."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True, slots=True)
class Partition:
    """A flat fp32 tensor that the optimizer moves, with the slices in it; between and after them is padding."""

    flat: Tensor
    slices: list[Slice]
    optimizer: torch.optim.Optimizer
    """Keeps this partition's state, under `flat`."""
    group: dict[str, Any]
    """The optimizer's parameter group it belongs to."""


def snapshot(
    engine: Any, copies: dict[tuple[int, str], Tensor] | None
) -> tuple[dict[tuple[str, str, int], Tensor], dict[str, Any]]:
    """This rank's part of the state. No collective.

    Args:
        engine: DeepSpeed's engine, between two optimizer steps.
        copies: where the state is copied to, so that training does not touch what is returned; filled, and used again by the
            next call, since fresh memory costs several times the copy. None returns what lies in host memory as it is.

    Returns:
        The slices on the CPU, 1-D, by (name, kind, start); and the rest as JSON, the same on every rank.

    Raises:
        CheckpointError: the optimizer keeps a state that is not one number an element.
    """
    slices: dict[tuple[str, str, int], Tensor] = {}
    step: int | None = None
    for index, partition in enumerate(_partitions(engine, changed=False)):
        kinds = {WEIGHTS: partition.flat.data}
        for kind, value in partition.optimizer.state.get(partition.flat, {}).items():
            if kind == "step":
                step = int(value)
            elif isinstance(value, Tensor) and value.shape == partition.flat.shape:
                kinds[kind] = value.data
            else:
                raise CheckpointError(
                    f"{type(partition.optimizer).__name__} keeps a state {kind} that is not one number for each element of a "
                    "parameter, and is not saved rightly. Use AdamW."
                )
        step = partition.group.get("step", step)
        for kind, flat in kinds.items():
            host = _on_host(flat, (index, kind), copies if copies is not None or not _is_swapped(engine) else {})
            for each in partition.slices:
                slices[each.name, kind, each.start] = host.narrow(0, each.offset, each.numel)
    for name, value in _buffers(engine.module).items() if comm.rank() == 0 else ():
        slices[name, BUFFER, 0] = value.detach().to("cpu", copy=True).flatten()
    if copies and engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return slices, {
        "step": step,
        "kinds": sorted({kind for _, kind, _ in slices} - {WEIGHTS, BUFFER}),
        "counters": {name: int(getattr(engine, name)) for name in ("global_steps", "global_samples", "skipped_steps")},
        "groups": [_numbers(group) for group in engine.optimizer.param_groups],
        "schedule": _plain(engine.lr_scheduler.state_dict()) if engine.lr_scheduler is not None else None,
        "loss_scaler": _plain(vars(engine.optimizer.loss_scaler)) if hasattr(engine.optimizer, "loss_scaler") else None,
    }


@torch.no_grad()
def restore(engine: Any, read: ReadSlice, rest: dict[str, Any]) -> None:
    """Put a saved state into an engine that has not made a step. Collective.

    Args:
        engine: DeepSpeed's engine; its stage, ranks and offload may be others than when the state was saved.
        read: fills a tensor with a part of the saved state.
        rest: the JSON that `snapshot` returned.

    Raises:
        CheckpointError: the state of a parameter is missing.
    """
    for partition in _partitions(engine, changed=True):
        for each in partition.slices:
            if not read(each.name, WEIGHTS, each.start, partition.flat.data.narrow(0, each.offset, each.numel)):
                raise CheckpointError(f"the checkpoint has no weights of {each.name}.")
        if rest["step"] is None:
            continue
        state = partition.optimizer.state[partition.flat]
        for kind in rest["kinds"]:
            state[kind] = torch.zeros_like(partition.flat.data)
            for each in partition.slices:
                if not read(each.name, kind, each.start, state[kind].narrow(0, each.offset, each.numel)):
                    raise CheckpointError(f"the checkpoint has no {kind} of {each.name}.")
        _set_step(partition, state, rest["step"])
    if rest["step"] is not None and hasattr(engine.optimizer.optimizer, "ds_opt_adam"):
        _count_up(engine.optimizer.optimizer, rest["step"])
    if engine.zero_optimization_stage() == 3:
        engine.optimizer._post_step(set())  # parameters that stay whole are gathered again
    else:
        engine.optimizer.update_lp_params()
    for name, value in _buffers(engine.module).items():
        read(name, BUFFER, 0, value.view(-1))
    for name, value in rest["counters"].items():
        setattr(engine, name, value)
    for group, saved in zip(engine.optimizer.param_groups, rest["groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name in group and name != "step"})
    if rest["schedule"] is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict({**engine.lr_scheduler.state_dict(), **rest["schedule"]})
    if rest["loss_scaler"] is not None:
        vars(engine.optimizer.loss_scaler).update(rest["loss_scaler"])


def _partitions(engine: Any, *, changed: bool) -> Iterator[Partition]:
    """This rank's partitions, one after the other; one on nvme is in memory while it is looked at.

    Args:
        engine: DeepSpeed's engine.
        changed: the caller writes into what it is given: then the model's own weights follow, and what lies on nvme is
            written back. Collective at stage 3.
    """
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 3:
        yield from _partitions_of_stage3(zero, names, changed)
        return
    is_bf16 = hasattr(zero, "bf16_groups")  # stage 1 in bf16 with fp32 gradients is another class of DeepSpeed's
    groups = zero.bf16_groups if is_bf16 else zero.bit16_groups
    flats = zero.fp32_groups_flat_partition if is_bf16 else zero.single_partition_of_fp32_groups
    for parameters, flat, group in zip(groups, flats, zero.optimizer.param_groups, strict=True):
        slices = []
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is not None:
                where, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                slices.append(Slice(names[id(parameter)], where.start, where.numel, there.start))
        yield Partition(flat, slices, zero.optimizer, group)


def _partitions_of_stage3(zero: Any, names: dict[int, str], changed: bool) -> Iterator[Partition]:
    if changed:
        zero._partition_all_parameters()
    for index, parameters in enumerate(zero.fp16_groups):
        flat = zero.fp32_partitioned_groups_flat[index]
        slices, offset = [], 0
        for parameter in parameters:
            numel = parameter.partition_numel()
            start = zero._get_param_partition_rank(parameter) * numel
            if (length := min(numel, parameter.ds_numel - start)) > 0:
                slices.append(Slice(names[id(parameter)], start, length, offset))
            offset += numel
        # With a ratio below 1, a part of the partitions stays on the GPU, under an optimizer of its own.
        on_device = zero.offload_optimizer and zero.subgroup_to_device[index] != "cpu"
        optimizer = zero.backup_optimizer if on_device else zero.optimizer
        if swapped := zero._swappable_optimizer_subgroup(index):
            zero._optimizer_states_and_gradient_swap_in(index)
        yield Partition(flat, slices, optimizer, optimizer.param_groups[zero.sub_group_to_group_id[index]])
        if changed:
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if swapped and changed:
            zero._optimizer_states_and_gradient_swap_out(index)
        elif swapped:
            zero._release_swap_buffers(index)


def _on_host(flat: Tensor, key: tuple[int, str], copies: dict[tuple[int, str], Tensor] | None) -> Tensor:
    """A flat tensor in host memory: a copy, or itself where it is there and no copies are wanted. The device may lag behind."""
    if copies is None:
        return flat.detach().cpu()
    if key not in copies or copies[key].shape != flat.shape:
        copies[key] = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
    return copies[key].copy_(flat.detach(), non_blocking=True)


def _is_swapped(engine: Any) -> bool:
    """Whether partitions may lie on nvme, so that their memory is reused as soon as the next one is looked at."""
    return engine.zero_optimization_stage() == 3 and bool(engine.optimizer.swap_optimizer)


def _set_step(partition: Partition, state: dict[str, Any], step: int) -> None:
    """Let the optimizer go on counting its steps from here, in the form its class wants."""
    kind = type(partition.optimizer)
    if kind.__name__ in _STEP_IN_GROUP:
        partition.group["step"] = step
    elif kind.__module__.startswith("torch.optim"):
        # torch/optim/adam.py: on the device of the parameter when the update is fused.
        on_device = partition.group.get("fused") or partition.group.get("capturable")
        state["step"] = torch.tensor(float(step), device=partition.flat.device if on_device else "cpu")
    else:
        state["step"] = step


def _count_up(cpu_adam: Any, step: int) -> None:
    """Let DeepSpeed's Adam on the CPU count its steps one by one, as in the run that goes on.

    It multiplies the powers of the betas up from step to step, but takes pow() where it sees steps left out: that rounds
    differently, and the run would be another one. Source: deepspeed/ops/csrc/includes/cpu_adam.h, IncrementStep.
    """
    parameter, gradient, exp_avg, exp_avg_sq = torch.zeros(4, 1).unbind()
    beta1, beta2 = cpu_adam.param_groups[0]["betas"]  # there is one counter for all groups
    for each in range(1, step + 1):
        cpu_adam.ds_opt_adam.adam_update(
            cpu_adam.opt_id, each, 0.0, beta1, beta2, 1.0, 0.0, True, parameter, gradient, exp_avg, exp_avg_sq
        )


def _buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's weights, by name; the same on every rank."""
    found = {}
    for prefix, inner in module.named_modules():
        for name, value in inner.named_buffers(recurse=False):
            if name not in inner._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = value
    return found


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a parameter group, without its parameters and its switches."""
    plain = _plain({name: value for name, value in group.items() if name != "params"})
    return {name: value for name, value in plain.items() if not isinstance(value, bool | str | None)}


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """What of some fields JSON can hold and give back unchanged."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        return value is None or isinstance(value, bool | int | float | str)

    return {name: value for name, value in fields.items() if is_plain(value)}
