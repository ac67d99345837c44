"""The configuration DeepSpeed is handed: what was written, with every "auto" and every shared setting filled in. Pure.

Defaults of DeepSpeed that changed between versions are written out, so that a run does not change with an upgrade.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ds_trainer.arguments.batch import BatchPlan, solve_batch
from ds_trainer.arguments.constraints import DEFAULT_STAGE
from ds_trainer.arguments.deepspeed_keys import AUTO_FROM_MODEL, OPTIMIZER_PARAMS, SCHEDULER_PARAMS, SHARED
from ds_trainer.arguments.merge import Resolved
from ds_trainer.errors import ArgumentsError

OptimizerKind = Literal["torch_adamw", "fused_adam", "cpu_adam", "deepspeed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What `deepspeed.initialize` gets, and why each value that nobody wrote is there."""

    config: dict[str, Any]
    reasons: dict[str, str]
    """Dotted path of a value that was computed -> how."""


def solve_run_batch(resolved: Resolved, data_parallel_size: int, *, keep_global: bool = False) -> BatchPlan:
    """Solve the batch arithmetic of a run.

    Args:
        resolved: the settings in force.
        data_parallel_size: ranks that see different rows.
        keep_global: where all three are stated for another number of ranks, keep the global batch and let accumulation
            follow; `debug` runs the batch of many ranks in one process so.

    Raises:
        ArgumentsError: the statements contradict each other at this number of ranks.
    """
    train = resolved.settings.train
    names = ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size")
    accumulation = train.gradient_accumulation_steps
    if keep_global and train.global_batch_size is not None and train.micro_batch_size is not None:
        accumulation = None
    plan = solve_batch(
        micro=train.micro_batch_size,
        accumulation=accumulation,
        total=train.global_batch_size,
        data_parallel_size=data_parallel_size,
        where={name: str(resolved.origins[f"train.{name}"]) for name in names if f"train.{name}" in resolved.origins},
    )
    if isinstance(plan, BatchPlan):
        return plan
    raise ArgumentsError([plan])


def zero_stage(resolved: Resolved) -> int:
    """The ZeRO stage in force: 1, 2 or 3."""
    node = resolved.deepspeed.find("zero_optimization.stage")
    return DEFAULT_STAGE if node is None else int(node.value)


def offload_device(resolved: Resolved, what: Literal["offload_optimizer", "offload_param"]) -> str:
    """Where the optimizer states or the parameters are kept: `none`, `cpu` or `nvme`."""
    node = resolved.deepspeed.find(f"zero_optimization.{what}.device")
    return "none" if node is None or node.value is None else str(node.value)


def optimizer_kind(resolved: Resolved, device_type: str) -> OptimizerKind:
    """Which implementation moves the weights.

    All but `deepspeed` compute the same AdamW: torch's fused one needs no compiler and is as fast as DeepSpeed's, on a GPU
    too, where `torch_adam: false` takes that one; CPUAdam is the one DeepSpeed offloads with.
    `deepspeed` means that DeepSpeed builds what the block `optimizer` says.
    """
    block = resolved.deepspeed.find("optimizer")
    written: dict[str, Any] = block.plain() if block is not None else {"type": "AdamW"}
    params = written.get("params") or {}
    plain_adamw = str(written["type"]).lower() in ("adamw", "adam") and params.get("adam_w_mode", True) is True
    extras = params.keys() - {"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode"}
    if not plain_adamw or extras or written.get("legacy_fusion"):
        return "deepspeed"
    if params.get("torch_adam") is True:
        return "torch_adamw"
    if offload_device(resolved, "offload_optimizer") != "none":
        return "cpu_adam"
    return "fused_adam" if device_type == "cuda" and params.get("torch_adam") is False else "torch_adamw"


def needed_ops(resolved: Resolved, device_type: str) -> tuple[str, ...]:
    """Which of DeepSpeed's ops are compiled for this run, in the words of `engine.offload`.

    Source, for an optimizer that DeepSpeed builds: deepspeed 0.19.8, runtime/engine.py `_configure_basic_optimizer`.
    """
    kind = optimizer_kind(resolved, device_type)
    ops: list[str] = [kind] if kind in ("cpu_adam", "fused_adam") else []
    params = resolved.deepspeed.find("optimizer.params.torch_adam")
    if kind == "deepspeed" and (params is None or params.value is not True):
        name = written_optimizer(resolved).lower()
        offloaded = offload_device(resolved, "offload_optimizer") != "none"
        ops += filter(None, [_OPS_OF_DEEPSPEED.get(name, ("", ""))[offloaded]])
    if "nvme" in (offload_device(resolved, "offload_optimizer"), offload_device(resolved, "offload_param")):
        ops.append("async_io")
    return tuple(ops)


_OPS_OF_DEEPSPEED = {
    "adam": ("fused_adam", "cpu_adam"),
    "adamw": ("fused_adam", "cpu_adam"),
    "lion": ("fused_lion", "cpu_lion"),
    "lamb": ("fused_lamb", "fused_lamb"),
    "adagrad": ("", "cpu_adagrad"),
}
"""What `optimizer.type` of the JSON needs compiled: (on the device, offloaded)."""


def written_optimizer(resolved: Resolved) -> str:
    """Which optimizer it is, whoever implements it: AdamW, or what the DeepSpeed JSON names."""
    written = resolved.deepspeed.find("optimizer.type")
    return "AdamW" if written is None or optimizer_kind(resolved, "cpu") != "deepspeed" else str(written.value)


def uses_deepspeed_scheduler(resolved: Resolved) -> bool:
    """Whether DeepSpeed builds the schedule from a block `scheduler`; otherwise it is ours."""
    return resolved.deepspeed.find("scheduler") is not None


SMALLEST_BUCKET = 4096 * 4096
"""Elements that are sent at once where sizes are "auto", at least: 32 MiB in bf16.

hidden_size x hidden_size is about a matrix of the model. Below a width of 4096 that is a message too small to fill a network,
of which a step sends hundreds: 896 wide, 500 M parameters would go out in 600 pieces of 1.5 MiB instead of 30 of 32 MiB.
Source of the formula for larger ones: transformers, `HfTrainerDeepSpeedConfig`."""


def reason_against_whole_layers(zero: Mapping[str, Any]) -> str | None:
    """Why ZeRO-3 may not gather decoder layers whole under this block `zero_optimization`; None when it may."""
    device = (zero.get("offload_param") or {}).get("device")
    if device == "nvme":
        return "offload_param has a buffer of host memory for each weight, and not for all of a layer at once"
    if "leaf_module" in zero or zero.get("stage3_module_granularity_threshold") or zero.get("module_granularity_threshold"):
        return "the DeepSpeed JSON says which modules are"
    plus_plus = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "zenflow")
    for name in plus_plus:
        if zero.get(name):
            return f"it has not been tried with {name}"
    if zero.get("zero_hpz_partition_size", 1) != 1:
        return "it has not been tried with zero_hpz_partition_size"
    return None


def build_engine_config(
    resolved: Resolved, batch: BatchPlan, *, hidden_size: int | None, whole_layer: int | None, device_type: str
) -> EngineConfig:
    """Fill in what DeepSpeed is handed.

    Args:
        resolved: the settings in force.
        batch: the solved batch arithmetic.
        hidden_size: width of the model, for the sizes that are "auto"; None leaves those "auto", for display only.
        whole_layer: parameters of the largest decoder layer that ZeRO-3 may gather whole, 0 where there is none; None leaves
            what depends on it "auto", for display only.
        device_type: `cuda` or `cpu`.
    """
    settings, config = resolved.settings, resolved.deepspeed.plain()
    reasons: dict[str, str] = {}
    values: dict[str, Any] = {
        each.key: getattr(getattr(settings, section), name)
        for each in SHARED
        for section, _, name in [each.setting.partition(".")]
    }
    # A block that DeepSpeed obeys says what the run file says: DeepSpeed's own defaults are no settings in force.
    for block, takes in (("optimizer", OPTIMIZER_PARAMS), ("scheduler", SCHEDULER_PARAMS)):
        if block not in config:
            continue
        params = config[block].setdefault("params", {})
        kind = config[block]["type"].lower() if block == "optimizer" else config[block]["type"]
        for name in (*params, *takes.get(kind, takes[""])):
            if f"{block}.params.{name}" in values:
                params[name] = values[f"{block}.params.{name}"]
    if "scheduler" in config:
        params = config["scheduler"]["params"]
        if params.get("warmup_min_lr") == "auto":
            params["warmup_min_lr"] = 0.0
        if "warmup_num_steps" in params:  # DeepSpeed refuses 0
            params["warmup_num_steps"] = max(1, params["warmup_num_steps"])
            reasons["scheduler.params.warmup_num_steps"] = "train.warmup_steps, and 1 at least"
    if optimizer_kind(resolved, device_type) != "deepspeed":
        config.pop("optimizer", None)
        config["zero_allow_untested_optimizer"] = True
        config.setdefault("zero_force_ds_cpu_optimizer", optimizer_kind(resolved, device_type) == "cpu_adam")

    config.pop("train_batch_size", None)  # it follows, and zero.Init reads it before the number of ranks is known
    config["train_micro_batch_size_per_gpu"] = batch.micro_batch_size
    config["gradient_accumulation_steps"] = batch.gradient_accumulation_steps
    config["gradient_clipping"] = settings.train.max_grad_norm
    config.pop("steps_per_print", None)  # the trainer prints
    for name in ("tensorboard", "wandb", "csv_monitor", "comet"):
        if values[name] is not None:
            config[name] = values[name]
        else:
            config.pop(name, None)  # "auto", and the run file says nothing
    reasons["train_micro_batch_size_per_gpu"] = reasons["gradient_accumulation_steps"] = str(batch)

    precision = settings.train.precision
    bf16 = {**config.pop("bfloat16", {}), **config.get("bf16", {}), "enabled": precision == "bf16"}
    if precision == "bf16":
        bf16.setdefault("check_grad_overflow", True)  # off before DeepSpeed 0.19.3
    config["bf16"] = bf16
    if precision == "fp16" or "fp16" in config:
        config["fp16"] = {**config.get("fp16", {}), "enabled": precision == "fp16"}

    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("stage", DEFAULT_STAGE)
    if reason_against_whole_layers(zero) is not None:
        whole_layer = 0
    for name in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
        path = f"zero_optimization.{name}"
        if zero.get(name) != "auto":
            continue
        if hidden_size is None or (name == "stage3_prefetch_bucket_size" and whole_layer is None and zero["stage"] == 3):
            reasons[path] = f"{AUTO_FROM_MODEL[path]}; known when the model is loaded"
            continue
        square = hidden_size * hidden_size
        reasons[path] = f"{AUTO_FROM_MODEL[path]}; hidden_size = {hidden_size}"
        if name == "reduce_bucket_size":
            zero[name] = max(square, SMALLEST_BUCKET)
        elif name == "stage3_prefetch_bucket_size":
            zero[name] = max(int(0.9 * square), whole_layer or 0)
            reasons[path] += f", such a layer {whole_layer:,}" if whole_layer else ", no layer is gathered whole"
        else:
            zero[name] = 10 * hidden_size
    return EngineConfig(config=config, reasons=reasons)


def hidden_size_of(config: Mapping[str, Any]) -> int | None:
    """The width of a model from the fields of its transformers config, or None when it does not say."""
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        for name in ("hidden_size", "n_embd", "d_model", "dim"):
            if isinstance(fields.get(name), int):
                return int(fields[name])
        if isinstance(fields.get("hidden_sizes"), list):
            return int(max(fields["hidden_sizes"]))
    return None


def read_hidden_size(resolved: Resolved) -> int | None:
    """The same from the run file or a local `config.json`, without importing transformers; None for a hub id."""
    model = resolved.settings.model
    if isinstance(model.config, dict):
        return hidden_size_of(model.config)
    path = Path(model.config or model.path or "")
    path = path / "config.json" if path.is_dir() else path
    try:
        return hidden_size_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return None
