"""What a rank and its node hold, part by part, in each phase of a run. Pure; docs/design/memory.md derives every term.

Sources are files of DeepSpeed 0.19.8: [12] deepspeed/runtime/zero/stage_1_and_2.py, [3] .../stage3.py, [coordinator]
.../partitioned_param_coordinator.py, [coalesced] deepspeed/runtime/comm/coalesced_collectives.py, [swap]
deepspeed/runtime/swap_tensor/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ds_trainer.plan.holding import Holding
from ds_trainer.plan.shape import LARGE_BLOCK, Shape, StepPeak, Weight

MIB = 2**20
CPU_PROCESS = 445 * MIB
"""Resident memory of a rank that trains next to nothing: Python, torch without CUDA, DeepSpeed, transformers, the loader.
Measured: scripts/bench/plan_accuracy.py, torch 2.13.0+cpu, DeepSpeed 0.19.8."""
CUDA_CONTEXT = 1024 * MIB
"""An allowance, not measured: the CUDA context, cuBLAS workspaces and NCCL's buffers, none of which torch counts as its own."""
CUDA_PROCESS = 3 * 1024 * MIB
"""An allowance, not measured: host memory of a rank with the CUDA libraries loaded."""

Parts = dict[str, float]
"""Part -> bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """What one rank, the one that holds most, takes at most."""

    device: dict[str, Parts]
    """By phase. On the CPU the process as a whole, host parts included."""
    host: dict[str, Parts]
    """The rank's share of its node's memory by phase; empty on the CPU, where `device` is it."""
    nvme: Parts
    """On the local disk."""
    checkpoint: Parts
    """Of the whole run, on the disk of `checkpoint.folder`; one checkpoint."""

    def peak(self, where: str) -> tuple[str, float]:
        """The phase with the most, and how much: of `device` or `host`."""
        phases: dict[str, Parts] = getattr(self, where)
        return max(((name, sum(parts.values())) for name, parts in phases.items()), key=lambda each: each[1], default=("", 0.0))


def checkpoint_of(trained: int, moment_bytes: int = 8) -> Parts:
    """What one checkpoint takes on the disk: what `engine.state.snapshot` gives, without its JSON.

    Args:
        trained: parameters that are trained.
        moment_bytes: of the optimizer for each of them; Adam has two moments in fp32.
    """
    return {"fp32 weights": 4.0 * trained, "optimizer states": float(moment_bytes * trained)}


def states_of(holding: Holding, *, parameters: int, trained: int) -> Parts:
    """What the states of the model take on the device of one rank; activations and buffers come on top.

    Source: ZeRO (Rajbhandari et al., 2020), section 3.1: a parameter and a gradient in the training type, and for Adam a copy
    and two moments in fp32. Stage 1 splits the optimizer states over the ranks, 2 the gradients too, 3 the parameters too.

    Args:
        holding: how the engine holds the model.
        parameters: of the model, as elements of the training type.
        trained: of them, those that are trained.
    """
    width, ranks = holding.weight_bytes, holding.ranks
    gradients = trained * width / (ranks if holding.stage >= 2 else 1)
    optimizer = trained * (4 + holding.moment_bytes) / ranks
    here = 1.0 if holding.optimizer_on == "none" else 1.0 - holding.offload_ratio
    return {
        "weights": 0.0 if holding.weights_on != "none" else parameters * width / (ranks if holding.stage == 3 else 1),
        "gradients": gradients if holding.optimizer_on == "none" or holding.stage == 1 else 0.0,
        "optimizer states": here * optimizer,
    }


def rank_memory(
    shape: Shape,
    holding: Holding,
    step: StepPeak,
    *,
    attention_mask: float,
    read_whole: Literal["by every rank", "by rank zero", "by nobody"],
    file_bytes: float,
    has_reference: bool = False,
) -> RankMemory:
    """Count what a rank holds.

    Args:
        shape: the model.
        holding: how the engine holds it.
        step: what a forward and backward pass keeps; with the gradients at stage 1 when there is one micro-step.
        attention_mask: bytes of a mask that the attention needs, if it needs one.
        read_whole: who has the whole model in host memory while it is built.
        file_bytes: of the files that its weights are read from; 0 where they are drawn.
        has_reference: a frozen copy of the model is computed with beside it, laid out as its weights are.
    """
    device, host, nvme = (_stage3 if holding.stage == 3 else _stages12)(shape, holding, step, attention_mask)
    copies = _saved_copies(shape, holding)
    checkpoint = checkpoint_of(shape.trained, holding.moment_bytes)
    whole = float(shape.held * holding.weight_bytes)
    largest_packed = max(each.packed for each in shape.weights)
    frozen = {"frozen copy as the reference": whole / (holding.ranks if holding.stage == 3 else 1)} if has_reference else {}
    if holding.on_cpu:
        phases = _on_cpu(shape, holding, step, device, host, copies)
        for parts in phases.values():
            parts |= frozen
        pages = {"pages of their files": file_bytes} if file_bytes else {}
        if read_whole != "by nobody":
            phases["loading"] = {"process": float(CPU_PROCESS), "weights as they are built": whole, **pages}
        if shape.packed:  # those that are not packed lie in the pages of their file, and keep it there
            for parts in phases.values():
                parts |= pages
            phases["loading"]["a weight as it is packed"] = 8.0 * largest_packed  # two copies in fp32
        return RankMemory(device=phases, host={}, nvme=nvme, checkpoint=checkpoint)
    if holding.weights_on == "none":
        device = {phase: {**parts, **frozen} for phase, parts in device.items()}
    else:  # DeepSpeed keeps the shards of both where `offload_param` says; on nvme, the copy is counted as host memory
        host = {**host, **frozen}
    if shape.packed:  # each rank reads and packs them one by one, whatever the stage
        device["loading"] = {
            "weights as they are built": whole,
            "a weight as it is packed": holding.weight_bytes * largest_packed,
        }
    for parts in device.values():
        parts["CUDA context and libraries (allowance)"] = CUDA_CONTEXT
    base = {"process (allowance)": float(CUDA_PROCESS)}
    readers = {"by every rank": 1.0, "by rank zero": 1 / holding.ranks_per_node, "by nobody": 0.0}[read_whole]
    return RankMemory(
        device=device,
        host={
            "loading": {**base, "weights as they are built": readers * whole},
            "training": {**base, **host, "copy of the state for saves": copies},
        },
        nvme=nvme,
        checkpoint=checkpoint,
    )


def _stages12(shape: Shape, holding: Holding, step: StepPeak, mask: float) -> tuple[dict[str, Parts], Parts, Parts]:
    """Stages 1 and 2, [12]: device by phase, host, nvme."""
    width, trained, ranks = holding.weight_bytes, shape.trained, holding.ranks
    held = states_of(holding, parameters=shape.held, trained=trained)
    largest = max((each.numel for each in shape.weights if each.trained), default=0)
    static = {
        "weights": held["weights"],
        "optimizer states": held["optimizer states"],
        "buffers of the model": float(shape.buffers_bytes),
        # temp_grad_buffer_for_gpu_offload; its like on the host is among the host's parts
        "offload buffer": 0.0 if holding.optimizer_on == "none" else float(width * largest),
    }
    own, largest_piece, crossing = _own_partition(shape.weights, ranks)
    at_home = holding.optimizer_on == "none"
    # copy_grads_in_partition: one buffer for all parameters that touch the own partition, whole. The second micro-step gets
    # another one, and is added to the first (independent_gradient_partition_epilogue).
    owned = holding.gradient_bytes * own if at_home else 0.0
    if holding.stage == 2:
        gradients = owned * (2 if holding.accumulation > 1 else 1)
        activations = step.total
    else:
        gradients = width * trained
        # Where the trace holds the gradients, they grow while the activations go.
        activations = max(0.0, step.total - gradients) if gradients_grow(holding) else step.total
        # They are copied one by one into the own partition's buffer, which on a GPU is there from the first one on.
        gradients += 0 if holding.on_cpu else owned
    bucket = min(holding.reduce_bucket, trained) if holding.on_cpu else holding.reduce_bucket
    buckets = width * bucket * (2 if holding.overlap_comm else 1) if holding.contiguous_gradients else 0.0
    # allreduce_bucket flattens what it reduces: a full bucket, or a parameter that is larger and lies in two partitions.
    reduced = width * max(min(holding.reduce_bucket, trained), crossing if crossing > holding.reduce_bucket else 0)
    backward = {
        **static,
        "gradients": gradients,
        "activations": activations,
        "attention mask": mask,
        "buckets for reducing": buckets,
        "flattened for reducing": float(reduced),
    }
    # step: the own gradients are flattened, widened to fp32, and the norm takes each in fp64 (get_norm_dtype).
    flat = trained / ranks * (4 if width == 4 else width + 4)
    update = {
        **static,
        "gradients": owned,
        "fp32 gradients, flattened": flat if at_home else 0.0,
        "gathering the new weights": _copied_by_gloo(holding, width * trained),
    }
    if at_home and holding.on_cpu:  # flattened gradients are gone before the weights are gathered
        update = _larger(update, "gradients", "fp32 gradients, flattened", than="gathering the new weights")
    norm = {**static, "gradients": owned, "one gradient in fp64, for the norm": 8.0 * largest_piece if at_home else 0.0}
    share = trained / ranks
    host = {}
    if not at_home:
        pinned = holding.pin_optimizer
        host = {
            "optimizer states": _pinned(4 * share, pinned) + holding.moment_bytes * share,
            "fp32 gradients": _pinned(4 * share, pinned),
            "updated weights on their way": _pinned(width * share, pinned),
            "offload buffer": _pinned(width * largest, pinned),
            "gradients added up": width * own if holding.accumulation > 1 else 0.0,
        }
    return {"forward and backward": backward, "norm": norm, "update": update}, host, {}


def _stage3(shape: Shape, holding: Holding, step: StepPeak, mask: float) -> tuple[dict[str, Parts], Parts, Parts]:
    """Stage 3, [3]: device by phase, host, nvme."""
    width, ranks = holding.weight_bytes, holding.ranks
    shards = width * sum(math.ceil(each.numel / ranks) for each in shape.weights)
    own = sum(math.ceil(each.numel / ranks) for each in shape.weights if each.trained)
    small = [each.numel for each in shape.weights if each.numel <= holding.persistence_threshold]
    home_optimizer, home_weights = holding.optimizer_on == "none", holding.weights_on == "none"
    on_host = 1.0 if home_optimizer else holding.offload_ratio
    here = 1.0 if home_optimizer else 1.0 - on_host
    states_bytes = (4 + holding.moment_bytes) * own
    static = {
        "weights": float(shards) if home_weights else 0.0,
        "a second set of weights (ZeRO++)": width * shape.held / holding.secondary_ranks
        if holding.secondary_ranks > 1
        else 0.0,
        "small weights that stay whole": float(width * sum(small)),
        "buffers of the model": float(shape.buffers_bytes),
        "optimizer states": here * states_bytes,
        # grad_partitions_flat_buffer, on the device of the optimizer
        "gradients": float(holding.gradient_bytes * own) if home_optimizer else 0.0,
        "buckets for reducing": float(width * holding.reduce_bucket) if holding.contiguous_gradients else 0.0,
    }
    if holding.on_cpu and holding.contiguous_gradients:  # what nobody writes to is not resident
        static["buckets for reducing"] = float(width * min(holding.reduce_bucket, shape.trained))
    largest = max(each.numel for each in shape.weights)
    backward = {
        **static,
        "gathered weights": float(width * live_parameters(shape, holding)),
        "weights on their way (prefetch, gather)": width * (holding.prefetch_bucket + gathered_at_once(shape, holding))
        if not holding.on_cpu
        else _copied_by_gloo(holding, width * max(largest, gathered_at_once(shape, holding))),
        "activations": step.total,
        "attention mask": mask,
        # reduce_scatter_coalesced concatenates a bucket's gradients; gloo copies them once more
        "concatenated for reducing": float(width * min(holding.reduce_bucket, shape.trained)),
    }
    part = min(holding.sub_group, own)
    # _prepare_fp32_grad_for_sub_group flattens and widens one sub-group at a time
    flat = part * (4 if width == 4 else width + 4) if home_optimizer else 0.0
    update = {**static, "fp32 gradients, flattened": float(flat)}
    gradient = max((math.ceil(each.numel / ranks) for each in shape.weights if each.trained), default=0)
    norm = {**static, "one gradient in fp64, for the norm": 8.0 * gradient if home_optimizer else 0.0}
    host: Parts = {}
    nvme: Parts = {}
    if holding.optimizer_on == "cpu":
        pinned = holding.pin_optimizer
        host = {
            "optimizer states": on_host * states_bytes,
            "fp32 gradients": _pinned(on_host * 4 * own, pinned),
            "gradients": _pinned(holding.gradient_bytes * own, pinned),
        }
    elif holding.optimizer_on == "nvme":
        nvme["optimizer states and fp32 gradients"] = float(own * (8 + holding.moment_bytes))
        host = {
            "swap buffers of the optimizer": holding.optimizer_buffers * _pinned(4.0 * part, not holding.on_cpu),
            "gradients": _pinned(holding.gradient_bytes * own, holding.pin_optimizer),
        }
    if holding.weights_on == "cpu":
        host["weights"] = _pinned(width * own, holding.pin_weights) + shards - width * own
    elif holding.weights_on == "nvme":
        nvme["weights"] = float(shards)
        host["weights kept in memory"] = _pinned(float(width * min(own, holding.max_in_cpu)), holding.pin_weights)
        host["swap buffers of the weights"] = _pinned(
            float(width * holding.weight_buffers * holding.weight_buffer), not holding.on_cpu
        )
    return {"forward and backward": backward, "norm": norm, "update": update}, host, nvme


def live_parameters(shape: Shape, holding: Holding) -> int:
    """Elements of weights that are whole on a rank at the same time at stage 3, at most.

    A module's weights are released after it unless one of the next `stage3_max_reuse_distance` elements of the trace is theirs
    ([coordinator] __params_to_release). From a weight d elements before the end of the forward pass, its backward is 2 d away:
    the backward pass passes the same d. With checkpointing it passes them twice, since each layer is computed anew: 3 d. What
    lies nearer to the end therefore stays; anywhere else it is one module. Where layers are gathered whole, computing one anew
    happens inside it, and where only some are computed anew, most are passed twice.
    """
    split = sum(each.numel for each in shape.weights if each.numel > holding.persistence_threshold)
    inside = holding.whole_layers and shape.whole_layer > 0
    passes = 3 if holding.gradient_checkpointing in (True, "selective") and not inside else 2
    return min(split, holding.max_reuse_distance // passes + gathered_at_once(shape, holding))


def gathered_at_once(shape: Shape, holding: Holding) -> int:
    """Elements of weights that stage 3 gathers for one module: with all it contains, if decoder layers are gathered whole."""
    return max(shape.largest_module, shape.whole_layer if holding.whole_layers else 0)


def _own_partition(weights: Sequence[Weight], ranks: int) -> tuple[int, int, int]:
    """Elements of all parameters that touch the fullest partition; the largest piece in one; the largest parameter in two.

    Parameters of a group lie end to end, padded to a multiple of two elements a rank ([12] flatten_dense_tensors_aligned).
    """
    owned = [0] * ranks
    largest = crossing = 0
    for decays in (True, False):
        group = [each.numel for each in weights if each.trained and each.decays is decays]
        partition = math.ceil(sum(group) / (2 * ranks)) * 2
        position = 0
        for numel in group:
            first, last = position // partition, (position + numel - 1) // partition
            for rank in range(first, min(last, ranks - 1) + 1):
                owned[rank] += numel
            largest = max(largest, min(numel, partition))
            if last > first:
                crossing = max(crossing, numel)
            position += numel
    return max(owned), largest, crossing


def _saved_copies(shape: Shape, holding: Holding) -> float:
    """What a save keeps of the state in host memory, a rank; see `engine/state.py`, `_on_host`.

    On a GPU the state has to come to the host for a save anyhow; the copy of a background save is pinned and kept.
    """
    share = shape.trained / holding.ranks
    kinds = [4.0, *[4.0] * (holding.moment_bytes // 4)]
    on_host = holding.on_cpu or holding.optimizer_on != "none"
    if on_host and not holding.keeps_copy and holding.optimizer_on != "nvme":
        return 0.0
    return sum(_pinned(each * share, not on_host and holding.keeps_copy) for each in kinds)


def _pinned(num_bytes: float, pinned: bool) -> float:
    """What a buffer takes in host memory: torch rounds pinned ones up to a power of two.

    Source: torch 2.13, aten/src/ATen/core/CachingHostAllocator.h, `allocate`, PowerOf2Ceil.
    """
    return float(2 ** math.ceil(math.log2(num_bytes))) if pinned and num_bytes >= 1 else float(num_bytes)


def _copied_by_gloo(holding: Holding, num_bytes: float) -> float:
    """Gloo gathers into, and scatters from, a copy as large as all ranks' parts together; NCCL works in place.

    Source: torch 2.13, torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, `newLikeFlat` in allgather and reduce_scatter.
    """
    return float(num_bytes) if holding.on_cpu and holding.ranks > 1 else 0.0


def _larger(parts: Parts, *names: str, than: str) -> Parts:
    """The parts with only the larger of two that are never there together."""
    several = sum(parts[name] for name in names)
    drop = [than] if several >= parts[than] else list(names)
    return {name: 0.0 if name in drop else size for name, size in parts.items()}


def gradients_grow(holding: Holding) -> bool:
    """Whether the gradients of all parameters come while the activations go: at stage 1, in the one micro-step of a step.

    On the CPU they count beside each other: see `_on_cpu`.
    """
    return holding.stage == 1 and holding.accumulation == 1 and not holding.on_cpu


def _on_cpu(
    shape: Shape, holding: Holding, step: StepPeak, device: dict[str, Parts], host: Parts, copies: float
) -> dict[str, Parts]:
    """The same as one process: host parts added, and what glibc does not give back.

    A freed block below LARGE_BLOCK stays with the process, so that the most the small ones ever took counts in every phase;
    of large blocks only those that are alive do. What small blocks leave does not serve others: glibc before 2.38 gives an
    aligned request no hole of just its size (bug 14581), and torch's requests are aligned. So small gradients lie beside what
    the activations left, and a weight that is gathered at stage 3 beside the hole of the copy that its gather made.
    """

    def split(weights: list[Weight]) -> tuple[float, float]:
        sizes = [each.numel * holding.weight_bytes for each in weights]
        return float(sum(each for each in sizes if each < LARGE_BLOCK)), float(
            sum(each for each in sizes if each >= LARGE_BLOCK)
        )

    kept, gradients, gathered = step.small, None, None
    small_trained, large_trained = split([each for each in shape.weights if each.trained])
    if holding.stage != 2 or holding.optimizer_on != "none":
        # They stay (stage 1), or are copied on their way: cloned and widened to fp64 for offload ([12]
        # set_norm_for_param_grad_in_gpu), scattered by gloo from a copy (stage 3).
        kept += small_trained
    if holding.stage == 1:
        gradients = large_trained
    elif holding.stage == 3:
        live = live_parameters(shape, holding) * holding.weight_bytes
        small, large = split(list(shape.weights))
        kept += 2 * min(live, small)
        gathered = min(live, large)
    found = {}
    for phase, parts in device.items():
        parts = parts | {name: parts.get(name, 0.0) + size for name, size in host.items()}
        if phase == "forward and backward":
            parts["activations"] = step.large
            parts |= {} if gradients is None else {"gradients": gradients}
            parts |= {} if gathered is None else {"gathered weights": gathered}
        parts["copy of the state for saves"] = copies
        parts["small blocks, which the allocator keeps"] = kept
        parts["process"] = float(CPU_PROCESS)
        found[phase] = parts
    return found
