"""What DeepSpeed accepts, and which of its keys are settings of the run file under another name.

DeepSpeed ignores a misspelt key at its top level and in every block that is not one of its pydantic models. So the keys
of those places stand here, written for DeepSpeed 0.19.6 to 0.20 (source: `deepspeed/runtime/config.py` and
`constants.py`; a test reads the installed version and fails when it knows a key that is missing here). Blocks that are pydantic
models are validated by the models themselves, in `validate_blocks`, the one function here that imports DeepSpeed.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ds_trainer.arguments.sources import Located
from ds_trainer.errors import Problem


@dataclass(frozen=True, slots=True)
class Shared:
    """One setting that can be said in two languages."""

    setting: str
    """Its name in the run file."""
    key: str
    """Its name in DeepSpeed's JSON."""


SHARED = (
    Shared("train.micro_batch_size", "train_micro_batch_size_per_gpu"),
    Shared("train.gradient_accumulation_steps", "gradient_accumulation_steps"),
    Shared("train.global_batch_size", "train_batch_size"),
    Shared("train.max_grad_norm", "gradient_clipping"),
    Shared("train.learning_rate", "optimizer.params.lr"),
    Shared("train.betas", "optimizer.params.betas"),
    Shared("train.eps", "optimizer.params.eps"),
    Shared("train.weight_decay", "optimizer.params.weight_decay"),
    Shared("train.warmup_steps", "scheduler.params.warmup_num_steps"),
    Shared("train.max_steps", "scheduler.params.total_num_steps"),
    Shared("train.learning_rate", "scheduler.params.warmup_max_lr"),
    Shared("monitor.log_every_steps", "steps_per_print"),
    Shared("monitor.tensorboard", "tensorboard"),
    Shared("monitor.wandb", "wandb"),
    Shared("monitor.csv_monitor", "csv_monitor"),
    Shared("monitor.comet", "comet"),
)
"""`train.precision` is shared too, but takes two blocks to say: see `precision_of`."""

SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedules that have a name in the run file; any other can be used through the JSON only."""

AUTO_FROM_MODEL = {
    "zero_optimization.reduce_bucket_size": "hidden_size x hidden_size, 4096 x 4096 at least",
    "zero_optimization.stage3_prefetch_bucket_size": "0.9 x hidden_size x hidden_size, at least a layer that is gathered whole",
    "zero_optimization.stage3_param_persistence_threshold": "10 x hidden_size",
}
"""Keys whose "auto" is computed from the model. Source of the formulas: transformers, `HfTrainerDeepSpeedConfig`."""

SCHEDULER_PARAMS: Mapping[str, tuple[str, ...]] = {
    "WarmupLR": ("warmup_max_lr", "warmup_num_steps"),
    "WarmupDecayLR": ("warmup_max_lr", "warmup_num_steps", "total_num_steps"),
    "WarmupCosineLR": ("warmup_num_steps", "total_num_steps"),
    "": (),
}
"""What each of them takes from the run file, any other in the last row.

DeepSpeed's own defaults would be others: 1000 steps of warm-up, a learning rate of 0.001.
"""

OPTIMIZER_PARAMS: Mapping[str, tuple[str, ...]] = {
    "adam": ("lr", "betas", "eps", "weight_decay"),
    "adamw": ("lr", "betas", "eps", "weight_decay"),
    "lamb": ("lr", "betas", "eps", "weight_decay"),
    "lion": ("lr", "betas", "weight_decay"),
    "adagrad": ("lr", "eps", "weight_decay"),
    "": ("lr",),
}
"""What the optimizers that DeepSpeed builds take from the run file, any other in the last row."""

_NUMBER = (int, float)
TOP_LEVEL: Mapping[str, tuple[type, ...]] = {
    "train_batch_size": (int,),
    "train_micro_batch_size_per_gpu": (int,),
    "gradient_accumulation_steps": (int,),
    "gradient_clipping": _NUMBER,
    "steps_per_print": (int,),
    "prescale_gradients": (bool,),
    "gradient_predivide_factor": _NUMBER,
    "gradient_allreduce_op": (str,),
    "communication_data_type": (str,),
    "dump_state": (bool,),
    "disable_python_gc": (bool,),
    "wall_clock_breakdown": (bool,),
    "memory_breakdown": (bool,),
    "log_level": (str,),
    "vocabulary_size": (int,),
    "zero_allow_untested_optimizer": (bool,),
    "zero_force_ds_cpu_optimizer": (bool,),
    "optimizer": (dict,),
    "scheduler": (dict,),
    "fp16": (dict,),
    "bf16": (dict,),
    "data_types": (dict,),
    "zero_optimization": (dict,),
    "aio": (dict,),
    "comms_logger": (dict,),
    "flops_profiler": (dict,),
    "timers": (dict,),
    "checkpoint": (dict,),
    "tensorboard": (dict,),
    "wandb": (dict,),
    "csv_monitor": (dict,),
    "comet": (dict,),
}
"""Keys of the top level that take effect here, with the types they may have."""

REFUSED: Mapping[str, str] = {
    "bfloat16": "the old name of `bf16`; rename the block",
    "activation_checkpointing": "it steers DeepSpeed's own checkpointing only; use `model.gradient_checkpointing: true`",
    "disable_allgather": "DeepSpeed reads it and does nothing with it; remove the key",
    "seq_parallel_communication_data_type": "sequence parallelism is not supported yet; remove the key",
    "managed_gradient_accumulation": "the trainer drives accumulation itself; remove the key",
    "dataloader_drop_last": "the trainer feeds the data itself, every row once an epoch; remove the key",
    "use_data_before_expert_parallelism": "expert parallelism is not supported; remove the key",
    "sequence_parallel_size": "sequence parallelism is not supported yet; remove the key",
    "data_parallel_size": "it follows from the number of ranks; remove the key",
    "tensor_parallel": "tensor parallelism is not supported yet; remove the block",
    "expert_parallel": "expert parallelism is not supported yet; remove the block",
    "pipeline": "pipeline parallelism is not supported; remove the block",
    "compile": "DeepCompile is not supported yet; remove the block",
    "torch_autocast": 'use `bf16: {"enabled": true}` or `train.precision: bf16` instead',
    "hybrid_engine": "it serves reinforcement learning, which is not supported; remove the block",
    "data_efficiency": "the trainer feeds the data itself; remove the block",
    "autotuning": "the launcher would rewrite the settings; remove the block",
    "weight_quantization": "it serves inference; remove the block",
    "datastates_ckpt": "checkpoints are written by the trainer's own protocol; remove the block",
    "nebula": "removed from DeepSpeed in 0.19.7; remove the block",
    "compression_training": "removed from DeepSpeed in 0.19.7; remove the block",
    "quantize_training": "removed from DeepSpeed in 0.19.7; remove the block",
    "sparse_attention": "removed from DeepSpeed in 0.19.7; use `model.attention: documents` with packing",
    "amp": "removed from DeepSpeed in 0.19.8; use `train.precision: bf16` or `fp16`",
    "sparse_gradients": "removed from DeepSpeed in 0.19.8; remove the key",
    "elasticity": "removed from DeepSpeed in 0.19.8; set train.global_batch_size and train.micro_batch_size",
    "curriculum_learning": "removed from DeepSpeed in 0.19.8; remove the block",
    "progressive_layer_drop": "removed from DeepSpeed in 0.19.8; remove the block",
    "eigenvalue": "removed from DeepSpeed in 0.19.8; remove the block",
    "graph_harvesting": "removed from DeepSpeed in 0.19.8; remove the key",
    "zero_optimization.mics_shard_size": "MiCS was removed from DeepSpeed in 0.19.7; use zero_hpz_partition_size",
    "zero_optimization.mics_hierarchical_params_gather": "MiCS was removed from DeepSpeed in 0.19.7; remove the key",
    "zero_optimization.zeropp_loco_param": "removed from DeepSpeed in 0.19.8; remove the key",
    "zero_optimization.cpu_offload": 'write `"offload_optimizer": {"device": "cpu"}` instead',
    "zero_optimization.cpu_offload_param": 'write `"offload_param": {"device": "cpu"}` instead',
    "zero_optimization.cpu_offload_use_pin_memory": 'write `"pin_memory": true` inside `offload_optimizer` instead',
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "its name is stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.legacy_stage1": "removed from DeepSpeed in 0.5.9; remove the key",
    "zero_optimization.zenflow": "ZenFlow updates inside a global batch, so the loss would not be exact; remove the block",
    "checkpoint.writer": "DeepSpeed's FastPersist files cannot be loaded again (DeepSpeed issue 8500); remove the block",
    "checkpoint.parallel_write": "it serves pipeline parallelism, which is not supported; remove the block",
    "checkpoint.load_universal": "resuming is the trainer's: use `checkpoint.resume`; remove the key",
    "checkpoint.use_node_local_storage": "a checkpoint is one folder that all ranks see; remove the key",
    "optimizer.params.max_grad_norm": "write `gradient_clipping` at the top level, or `train.max_grad_norm`",
}
"""Keys that DeepSpeed has or had and that are refused here, each with what to do instead."""

UNCHECKED_BLOCKS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "optimizer": {"type": (str,), "params": (dict,), "legacy_fusion": (bool,)},
    "scheduler": {"type": (str,), "params": (dict,)},
    "data_types": {"grad_accum_dtype": (str,), "param_dtype": (str,), "buffer_dtype": (str,), "keep_in_fp32_modules": (list,)},
    "aio": {
        "block_size": (int,),
        "queue_depth": (int,),
        "intra_op_parallelism": (int,),
        "single_submit": (bool,),
        "overlap_events": (bool,),
        "use_gds": (bool,),
    },
    "flops_profiler": {
        "enabled": (bool,),
        "recompute_fwd_factor": _NUMBER,
        "profile_step": (int,),
        "module_depth": (int,),
        "top_modules": (int,),
        "detailed": (bool,),
        "output_file": (str,),
    },
    "timers": {"throughput": (dict,)},
    "checkpoint": {"tag_validation": (str,), "checkpoint_serialization": (bool,)},
}
"""Blocks whose unknown keys DeepSpeed ignores, with the keys they may hold and their types."""

_MODELS: Mapping[str, str] = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "fp16": "deepspeed.runtime.precision_config:DeepSpeedFP16Config",
    "bf16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "comet": "deepspeed.monitor.config:CometConfig",
    "timers.throughput": "deepspeed.utils.config:DeepSpeedThroughputTimerConfig",
}
"""Blocks that are pydantic models of DeepSpeed's."""


def check_keys(tree: Located, typed_elsewhere: Collection[str] = ()) -> list[Problem]:
    """Find what the tables above can tell: unknown, removed, unsupported and misplaced keys, and wrong types.

    Args:
        tree: the DeepSpeed keys.
        typed_elsewhere: keys whose types the run file's schema has judged.
    """
    return list(_key_problems(tree, typed_elsewhere))


def _key_problems(tree: Located, typed_elsewhere: Collection[str]) -> Iterator[Problem]:
    for path, reason in REFUSED.items():
        if (found := tree.find(path)) is not None:
            yield Problem(where=str(found.origin), what=f"DeepSpeed key `{path}` is not accepted: {reason}")
    for key, node in tree.value.items():
        if key in REFUSED:
            continue
        if key not in TOP_LEVEL:
            yield Problem(
                where=str(node.origin), what=f"unknown DeepSpeed key `{key}`, which DeepSpeed would ignore{_suggest(key)}"
            )
        elif key not in typed_elsewhere:
            yield from _type_problem(key, node, TOP_LEVEL[key])
    for key in ("bf16.enabled", "fp16.enabled"):  # DeepSpeed would take "yes" for true
        if (found := tree.find(key)) is not None:
            yield from _type_problem(key, found, (bool,))
    for block, known in UNCHECKED_BLOCKS.items():
        found = tree.find(block)
        if found is None or not isinstance(found.value, dict):
            continue
        for inner, node in found.value.items():
            key = f"{block}.{inner}"
            if inner in known:
                yield from _type_problem(key, node, known[inner])
            elif key not in REFUSED:
                near = difflib.get_close_matches(inner, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"it may hold {', '.join(sorted(known))}"
                yield Problem(
                    where=str(node.origin), what=f"unknown DeepSpeed key `{key}`, which DeepSpeed would ignore; {hint}"
                )
        if block in ("optimizer", "scheduler") and "type" not in found.value:
            example = "AdamW" if block == "optimizer" else "WarmupCosineLR"
            yield Problem(where=str(found.origin), what=f'DeepSpeed block `{block}` has no `type`; write "type": "{example}"')


def _type_problem(key: str, node: Located, types: tuple[type, ...]) -> Iterator[Problem]:
    if node.value != "auto" and type(node.value) not in types:  # not isinstance: a bool is an int to Python
        yield Problem(where=str(node.origin), what=f"DeepSpeed key `{key}` = {show(node)} must be {_TYPE_NAMES[types[-1]]}")


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a block in braces",
}


def _suggest(key: str) -> str:
    block, dot, rest = key.partition(".")
    if dot and block in TOP_LEVEL:
        return f'; a dot is no block: write "{block}": {{"{rest}": ...}}'
    for each in SHARED:
        if each.setting.endswith(f".{key}"):
            return f"; DeepSpeed calls it `{each.key}`"
        if each.key.endswith(f".{key}"):
            return f"; it belongs in the block `{each.key.rpartition('.')[0]}`"
    homes: dict[str, Collection[str]] = {**_MODEL_KEYS, **UNCHECKED_BLOCKS}
    home = next((home for home, keys in homes.items() if key in keys and key not in ("type", "params", "enabled")), None)
    if home is None and key.startswith("stage3_"):
        home = "zero_optimization"
    near = difflib.get_close_matches(key, TOP_LEVEL, n=1)
    return f"; it belongs in the block `{home}`" if home else f"; did you mean `{near[0]}`?" if near else "; remove it"


_MODEL_KEYS = {
    "zero_optimization": (
        "stage",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "sub_group_size",
        "offload_optimizer",
        "offload_param",
        "round_robin_gradients",
    ),
    "fp16": ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"),
    "bf16": ("immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"),
}
"""Keys of pydantic blocks that are often written at the top level: for the hint only."""


def validate_blocks(tree: Located) -> list[Problem]:
    """Validate the nested blocks with DeepSpeed's own pydantic models and classes. Imports DeepSpeed: takes seconds."""
    models: dict[str, Any] = {}
    for block, target in _MODELS.items():
        module, name = target.split(":")
        models[block] = getattr(importlib.import_module(module), name)
    names = {
        block: [name for field, info in model.model_fields.items() for name in (info.alias, field) if name]
        for block, model in models.items()
    }
    problems = [*_class_problems(tree)]
    for block, model in models.items():
        node = tree.find(block)
        if node is not None and isinstance(node.value, dict):
            problems += _model_problems(tree, block, node, model, names)
    return problems


def _model_problems(tree: Located, block: str, node: Located, model: Any, names: Mapping[str, list[str]]) -> Iterator[Problem]:
    from pydantic import ValidationError

    try:
        taken = model(**{key: value for key, value in node.plain().items() if value != "auto"})
        yield from _coerced(block, node, taken)
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join([block, *map(str, detail["loc"])])
            at = tree.find(key) or node
            if detail["type"] == "extra_forbidden":
                hint = _home(block, [str(part) for part in detail["loc"]], model, names)
                yield Problem(where=str(at.origin), what=f"unknown DeepSpeed key `{key}`; {hint}")
            else:
                said = detail["msg"][0].lower() + detail["msg"][1:]
                shown = f"DeepSpeed key `{key}` = {show(at)}" if detail["loc"] else f"DeepSpeed block `{block}`"
                yield Problem(where=str(at.origin), what=f"{shown} is not valid: {said}")
    except Exception as error:  # the models raise bare errors from their validators
        said = str(error).splitlines()[0] if str(error) else repr(error)
        yield Problem(where=str(node.origin), what=f"DeepSpeed refuses the block `{block}`: {said}")


def _coerced(block: str, node: Located, taken: Any) -> Iterator[Problem]:
    """Values that DeepSpeed would take for something else: `"8"` for 8, `true` for 1, `"no"` for false."""
    fields = {name: field for field, info in type(taken).model_fields.items() for name in (field, info.alias)}
    for key, child in node.value.items():
        value = getattr(taken, fields.get(key, key), None)
        if isinstance(child.value, dict) and hasattr(value, "model_fields_set"):
            yield from _coerced(f"{block}.{key}", child, value)
        elif isinstance(child.value, (str, bool, int)) and isinstance(value, (bool, int, float)) and child.value != "auto":
            wanted = bool if isinstance(value, bool) else int
            if type(child.value) is not wanted:
                yield from _type_problem(f"{block}.{key}", child, (bool if wanted is bool else float,))


def _home(block: str, location: list[str], model: Any, names: Mapping[str, list[str]]) -> str:
    """Where an unknown key of a block belongs."""
    key = location[-1]
    siblings = names[block]
    for part in location[:-1]:
        field = next((info for name, info in model.model_fields.items() if part in (name, info.alias)), None)
        inner = [each for each in getattr(field.annotation, "__args__", ()) if hasattr(each, "model_fields")] if field else []
        model = inner[0] if inner else field.annotation if field else None
        siblings = list(getattr(model, "model_fields", {}))
    if near := difflib.get_close_matches(key, siblings, n=1):
        return f"did you mean `{near[0]}`?"
    if key in TOP_LEVEL:
        return "it belongs at the top level"
    owner = next((owner for owner, theirs in names.items() if key in theirs and owner != block), None)
    owner = owner or (block if len(location) > 1 and key in names[block] else None)
    return f"it belongs in the block `{owner}`" if owner else f"`{'.'.join([block, *location[:-1]])}` has no such key"


def _class_problems(tree: Located) -> Iterator[Problem]:
    """The names in `optimizer.type` and `scheduler.type`, and the parameters of those whose signature lists them all."""
    import torch
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    for block, place, own in (
        ("optimizer", torch.optim, {name.lower(): None for name in DEEPSPEED_OPTIMIZERS}),
        (
            "scheduler",
            torch.optim.lr_scheduler,
            {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES},
        ),
    ):
        node = tree.find(f"{block}.type")
        if node is None or not isinstance(node.value, str):
            continue
        name = node.value.lower() if block == "optimizer" else node.value
        if name not in own and not isinstance(getattr(place, node.value, None), type):
            known = [*own, *(each for each in vars(place) if each[0].isupper())]
            near = difflib.get_close_matches(node.value, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"DeepSpeed has {', '.join(own)}"
            yield Problem(where=str(node.origin), what=f"DeepSpeed knows no {block} `{node.value}`; {hint}")
            continue
        build = own.get(name) if name in own else getattr(place, node.value)
        params = tree.find(f"{block}.params")
        if build is None or params is None or not isinstance(params.value, dict):
            continue
        takes = list(inspect.signature(build).parameters)[1:]
        for key, child in params.value.items():
            if key not in takes:
                near = difflib.get_close_matches(key, takes, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(takes)}"
                what = f"DeepSpeed key `{block}.params.{key}`: {node.value} has no such parameter; {hint}"
                yield Problem(where=str(child.origin), what=what)


def leftover_autos(tree: Located) -> list[Problem]:
    """Every "auto" that neither the run file nor the model can fill.

    DeepSpeed drops an "auto" inside its pydantic blocks, so that `bf16.enabled: "auto"` trains in fp32 without a word.
    """
    fillable = {each.key for each in SHARED} | AUTO_FROM_MODEL.keys()
    fillable |= {"bf16.enabled", "fp16.enabled", "data_types.keep_in_fp32_modules", "scheduler.params.warmup_min_lr"}
    return [
        Problem(where=str(node.origin), what=f'DeepSpeed key `{path}` = "auto", and {_NO_AUTO.get(path, _NOTHING_SAYS)}')
        for path, node in tree.leaves()
        if node.value == "auto" and path not in fillable
    ]


_NOTHING_SAYS = "no setting of the run file says what it should be; write a value, or remove the key for DeepSpeed's default"
_NO_AUTO = {
    "optimizer.type": 'the run file knows AdamW only; write "AdamW", or remove the block `optimizer`',
    "scheduler.type": "train.schedule needs no block; remove the block `scheduler`, or name one of DeepSpeed's schedules",
}


def precision_of(tree: Located, ours: Located | None) -> list[tuple[str, Located]]:
    """What the blocks `bf16` and `fp16` say of `train.precision`: true names it, false rules it out.

    Args:
        tree: the DeepSpeed keys.
        ours: what the run file says of it.

    Returns:
        The key that says something, and the value of `train.precision` that it comes to; empty when they agree with `ours`.
    """
    enabled = {name: tree.find(f"{name}.enabled") for name in ("bf16", "fp16")}
    for name, node in enabled.items():
        if node is not None and node.value is True:
            return [(f"{name}.enabled", Located(name, node.origin))]
    ruled_out = "bf16" if ours is None or ours.value is None else ours.value  # bf16 is the default
    node = enabled.get(ruled_out) if isinstance(ruled_out, str) else None
    if node is not None and node.value is False:
        return [(f"{ruled_out}.enabled", Located("fp32", node.origin))]
    return []


def show(node: Located, limit: int = 60) -> str:
    """A value as text for a message, as JSON writes it, shortened."""
    text = json.dumps(node.plain(), ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."
