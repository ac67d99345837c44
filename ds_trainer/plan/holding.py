"""How an engine holds a model: what of DeepSpeed's JSON and of the run file decides memory and traffic. Pure.

Defaults are those of DeepSpeed 0.19.8, deepspeed/runtime/zero/config.py and offload_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_trainer.arguments.batch import BatchPlan
from ds_trainer.arguments.engine_config import (
    EngineConfig,
    offload_device,
    reason_against_whole_layers,
    written_optimizer,
    zero_stage,
)
from ds_trainer.arguments.merge import Resolved
from ds_trainer.arguments.schema import Recompute

TYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MOMENTS = {"adam": 8, "adamw": 8, "lamb": 8, "fusedlamb": 8, "lion": 4, "adagrad": 4, "sgd": 0, "muon": 4}
"""Bytes of fp32 state a trained parameter, besides its fp32 copy. SGD is counted without momentum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """What decides how much an engine holds, and what it sends."""

    stage: int
    ranks: int
    ranks_per_node: int
    on_cpu: bool
    """The ranks compute on the CPU: then gloo moves the tensors, and glibc holds the memory."""
    weight_bytes: int
    """Of a weight in forward and backward."""
    gradient_bytes: int
    """Of a gradient while it is added up."""
    moment_bytes: int
    """Of the optimizer's state for a trained parameter, besides the fp32 copy."""
    optimizer_on: str
    """`none`, `cpu` or `nvme`."""
    weights_on: str
    pin_optimizer: bool
    pin_weights: bool
    accumulation: int
    """Micro-steps of an optimizer step."""
    gradient_checkpointing: Recompute
    reduce_bucket: int
    """Elements, as the sizes below."""
    overlap_comm: bool
    reduces_to_all: bool
    """Below stage 3: a bucket is all-reduced even where one rank owns its gradients."""
    contiguous_gradients: bool
    prefetch_bucket: int
    whole_layers: bool
    """Stage 3 gathers decoder layers whole, where the model allows it."""
    persistence_threshold: int
    max_reuse_distance: int
    sub_group: int
    offload_ratio: float
    optimizer_buffers: int
    weight_buffers: int
    weight_buffer: int
    max_in_cpu: int
    secondary_ranks: int
    """ZeRO++ keeps a second set of shards over so many ranks for the backward pass; 1: none."""
    keeps_copy: bool
    """A save in the background works from a copy of the state, which is kept from one save to the next."""


def holding_of(resolved: Resolved, engine: EngineConfig, batch: BatchPlan, *, ranks_per_node: int, device_type: str) -> Holding:
    """Read it from what DeepSpeed is handed.

    Args:
        resolved: the settings in force.
        engine: as `build_engine_config` made it.
        batch: the solved batch arithmetic.
        ranks_per_node: ranks of one node.
        device_type: `cuda` or `cpu`.
    """
    settings = resolved.settings
    zero: Mapping[str, Any] = engine.config["zero_optimization"]
    optimizer, weights = (zero.get(f"offload_{what}") or {} for what in ("optimizer", "param"))
    weight_bytes = TYPE_BYTES[settings.train.precision]
    accumulated_in = (engine.config.get("data_types") or {}).get("grad_accum_dtype")
    stage = zero_stage(resolved)
    optimizer_on = offload_device(resolved, "offload_optimizer")
    return Holding(
        stage=stage,
        ranks=batch.data_parallel_size,
        ranks_per_node=ranks_per_node,
        on_cpu=device_type == "cpu",
        weight_bytes=weight_bytes,
        gradient_bytes=TYPE_BYTES.get(str(accumulated_in), weight_bytes),
        moment_bytes=_MOMENTS.get(written_optimizer(resolved).lower(), 8),
        # nvme below stage 3 acts as cpu, and offload_param has no effect there.
        optimizer_on="cpu" if optimizer_on == "nvme" and stage < 3 else optimizer_on,
        weights_on=offload_device(resolved, "offload_param") if stage == 3 else "none",
        pin_optimizer=device_type == "cuda" and bool(optimizer.get("pin_memory", True)),
        pin_weights=device_type == "cuda" and bool(weights.get("pin_memory", True)),
        accumulation=batch.gradient_accumulation_steps,
        gradient_checkpointing=settings.model.gradient_checkpointing,
        reduce_bucket=_count(zero, "reduce_bucket_size", 500_000_000),
        overlap_comm=bool(zero.get("overlap_comm", stage == 3)),
        reduces_to_all=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
        contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
        prefetch_bucket=_count(zero, "stage3_prefetch_bucket_size", 50_000_000),
        whole_layers=stage == 3 and reason_against_whole_layers(zero) is None,
        persistence_threshold=_count(zero, "stage3_param_persistence_threshold", 100_000),
        max_reuse_distance=_count(zero, "stage3_max_reuse_distance", 1_000_000_000),
        sub_group=_count(zero, "sub_group_size", 1_000_000_000),
        offload_ratio=float(optimizer.get("ratio", 1.0)) if stage == 3 else 1.0,
        optimizer_buffers=_count(optimizer, "buffer_count", 4),
        weight_buffers=_count(weights, "buffer_count", 5),
        weight_buffer=_count(weights, "buffer_size", 100_000_000),
        max_in_cpu=_count(weights, "max_in_cpu", 1_000_000_000),
        secondary_ranks=_count(zero, "zero_hpz_partition_size", 1) if stage == 3 else 1,
        keeps_copy=settings.checkpoint.background,
    )


def _count(block: Mapping[str, Any], key: str, default: int) -> int:
    value = block.get(key)
    return default if value is None else int(value)
