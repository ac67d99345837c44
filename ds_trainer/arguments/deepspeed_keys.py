"""What DeepSpeed accepts, and which of its keys are settings of the run file under another name.

DeepSpeed ignores a misspelt key at its top level and in every block that is not one of its pydantic models. So the keys
of those places stand here, written for DeepSpeed 0.19.6 to 0.20 (source: `deepspeed/runtime/config.py` and
`constants.py`; a test reads the installed version and fails when it knows a key that is missing here). Blocks that are pydantic
models are validated by the models themselves, in `validate_blocks`, the one function here that imports DeepSpeed.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
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
    Shared("train.min_learning_rate", "scheduler.params.warmup_min_lr"),
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
    "zero_optimization.reduce_bucket_size": "hidden_size x hidden_size",
    "zero_optimization.stage3_prefetch_bucket_size": "0.9 x hidden_size x hidden_size",
    "zero_optimization.stage3_param_persistence_threshold": "10 x hidden_size",
}
"""Keys whose "auto" is computed from the model. Source of the formulas: transformers, `HfTrainerDeepSpeedConfig`."""

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
    "seq_parallel_communication_data_type": (str,),
    "disable_allgather": (bool,),
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
    "bfloat16": (dict,),
    "data_types": (dict,),
    "zero_optimization": (dict,),
    "activation_checkpointing": (dict,),
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
    "zero_optimization.zenflow": "ZenFlow updates inside a global batch, so the loss would not be exact; remove the block",
    "checkpoint.writer": "DeepSpeed's FastPersist files cannot be loaded again (DeepSpeed issue 8500); remove the block",
    "checkpoint.load_universal": "resuming is the trainer's: use `checkpoint.resume`; remove the key",
    "checkpoint.use_node_local_storage": "a checkpoint is one folder that all ranks see; remove the key",
    "optimizer.params.max_grad_norm": "write `gradient_clipping` at the top level, or `train.max_grad_norm`",
    "scheduler.params.warmup_max_lr": 'it is `train.learning_rate`; write "auto"',
}
"""Keys that DeepSpeed has or had and that are refused here, each with what to do instead."""

UNCHECKED_BLOCKS: Mapping[str, frozenset[str]] = {
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "scheduler": frozenset({"type", "params"}),
    "data_types": frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}),
    "activation_checkpointing": frozenset(
        {
            "partition_activations",
            "number_checkpoints",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "profile",
            "cpu_checkpointing",
        }
    ),
    "aio": frozenset({"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"}),
    "flops_profiler": frozenset(
        {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"}
    ),
    "timers": frozenset({"throughput"}),
    "checkpoint": frozenset({"tag_validation", "parallel_write", "checkpoint_serialization"}),
}
"""Blocks whose unknown keys DeepSpeed ignores, with the keys they may hold."""

_MODELS: Mapping[str, str] = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "fp16": "deepspeed.runtime.precision_config:DeepSpeedFP16Config",
    "bf16": "deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "comet": "deepspeed.monitor.config:CometConfig",
}
"""Blocks that are pydantic models of DeepSpeed's."""


def check_keys(tree: Located) -> list[Problem]:
    """Find what the tables above can tell: unknown, removed, unsupported and misplaced keys, and wrong types."""
    return list(_key_problems(tree))


def _key_problems(tree: Located) -> Iterator[Problem]:
    for path, reason in REFUSED.items():
        if (found := tree.find(path)) is not None and not (path.endswith("warmup_max_lr") and found.value == "auto"):
            yield Problem(where=str(found.origin), what=f"DeepSpeed key `{path}` is not accepted: {reason}")
    for key, node in tree.value.items():
        if key in REFUSED:
            continue
        if key not in TOP_LEVEL:
            yield Problem(where=str(node.origin), what=f"unknown DeepSpeed key `{key}`{_suggest(key)}")
        elif node.value != "auto" and not _has_type(node.value, TOP_LEVEL[key]):
            kind = " or ".join(_TYPE_NAMES[each] for each in TOP_LEVEL[key])
            yield Problem(where=str(node.origin), what=f"DeepSpeed key `{key}` = {show(node)} must be {kind}")
        elif key in UNCHECKED_BLOCKS and isinstance(node.value, dict):
            for inner, child in node.value.items():
                if inner not in UNCHECKED_BLOCKS[key] and f"{key}.{inner}" not in REFUSED:
                    known = ", ".join(sorted(UNCHECKED_BLOCKS[key]))
                    near = difflib.get_close_matches(inner, UNCHECKED_BLOCKS[key], n=1)
                    hint = f"did you mean `{near[0]}`?" if near else f"it may hold {known}"
                    yield Problem(
                        where=str(child.origin),
                        what=f"unknown DeepSpeed key `{key}.{inner}`, which DeepSpeed would ignore; {hint}",
                    )
    for block in ("optimizer", "scheduler"):
        found = tree.find(block)
        if found is not None and isinstance(found.value, dict) and not isinstance(_plain(tree, f"{block}.type"), str):
            example = "AdamW" if block == "optimizer" else "WarmupCosineLR"
            yield Problem(where=str(found.origin), what=f'DeepSpeed block `{block}` has no `type`; write "type": "{example}"')


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a block in braces",
}


def _has_type(value: Any, types: tuple[type, ...]) -> bool:
    return type(value) in types  # not isinstance: a bool is an int to Python


def _suggest(key: str) -> str:
    for block, keys in UNCHECKED_BLOCKS.items():
        if key in keys - {"type", "params", "enabled"}:
            return f"; it belongs in the block `{block}`"
    if key in _ZERO_HINTS or key.startswith("stage3_"):
        return "; it belongs in the block `zero_optimization`"
    near = difflib.get_close_matches(key, TOP_LEVEL, n=1)
    return f", which DeepSpeed would ignore; did you mean `{near[0]}`?" if near else ", which DeepSpeed would ignore"


_ZERO_HINTS = frozenset(
    {
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
    }
)


def validate_blocks(tree: Located) -> list[Problem]:
    """Validate the nested blocks with DeepSpeed's own pydantic models. Imports DeepSpeed: takes seconds."""
    from pydantic import ValidationError

    problems: list[Problem] = []
    fields_of: dict[str, str] = {}
    models = {}
    for block, target in _MODELS.items():
        module, name = target.split(":")
        models[block] = getattr(importlib.import_module(module), name)
        fields_of |= {
            spelling: block
            for field, info in models[block].model_fields.items()
            for spelling in (field, info.alias)
            if spelling
        }
    for block, model in models.items():
        node = tree.find(block)
        if node is None or not isinstance(node.value, dict):
            continue
        values = {key: value for key, value in node.plain().items() if value != "auto"}
        try:
            model(**values)
        except ValidationError as error:
            for detail in error.errors():
                location = [str(part) for part in detail["loc"]]
                at = tree.find(".".join([block, *location])) or node
                key = ".".join([block, *location])
                if detail["type"] == "extra_forbidden":
                    known = [name for name, owner in fields_of.items() if owner == block]
                    near = difflib.get_close_matches(location[-1], known, n=1) if len(location) == 1 else []
                    owner = fields_of.get(location[-1])
                    hint = (
                        f"did you mean `{near[0]}`?"
                        if near
                        else f"it belongs in the block `{owner}`"
                        if owner and owner != block
                        else "it belongs at the top level"
                        if location[-1] in TOP_LEVEL
                        else "DeepSpeed has no such key"
                    )
                    problems.append(Problem(where=str(at.origin), what=f"unknown DeepSpeed key `{key}`; {hint}"))
                else:
                    what = f"DeepSpeed key `{key}` = {show(at)}: {detail['msg'].lower()}"
                    problems.append(Problem(where=str(at.origin), what=what))
        except Exception as error:  # the models raise bare errors from their validators
            what = f"DeepSpeed refuses the block `{block}`: {str(error).splitlines()[0] if str(error) else error!r}"
            problems.append(Problem(where=str(node.origin), what=what))
    return problems


def leftover_autos(tree: Located) -> list[Problem]:
    """Every "auto" that neither the run file nor the model can fill.

    DeepSpeed drops an "auto" inside its pydantic blocks, so that `bf16.enabled: "auto"` trains in fp32 without a word.
    """
    shared = {each.key for each in SHARED} | {"bf16.enabled", "fp16.enabled", "optimizer.type", "scheduler.type"}
    fillable = shared | AUTO_FROM_MODEL.keys() | {"data_types.keep_in_fp32_modules", "scheduler.params.warmup_max_lr"}
    return [
        Problem(
            where=str(node.origin),
            what=f'DeepSpeed key `{path}` = "auto", and no setting of the run file says what it should be; '
            "write a value, or remove the key for DeepSpeed's default",
        )
        for path, node in tree.leaves()
        if node.value == "auto" and path not in fillable
    ]


def precision_of(tree: Located) -> Located | None:
    """Translate the blocks `bf16` and `fp16` into a value of `train.precision`, or None when they say nothing."""
    enabled = {name: tree.find(f"{name}.enabled") for name in ("bf16", "fp16")}
    for name, node in enabled.items():
        if node is not None and node.value is True:
            return Located(name, node.origin)
    if (bf16 := enabled["bf16"]) is not None and bf16.value is False:
        return Located("fp32", bf16.origin)
    return None


def show(node: Located, limit: int = 60) -> str:
    """A value as text for a message, shortened."""
    text = f'"{node.value}"' if isinstance(node.value, str) else str(node.plain())
    text = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _plain(tree: Located, path: str) -> Any:
    node = tree.find(path)
    return None if node is None else node.plain()
