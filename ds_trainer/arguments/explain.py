"""Say what is wrong with a setting: where it stands, what was found, the rule, and the nearest thing that would be right."""

from __future__ import annotations

import difflib
import functools
import math
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_trainer.arguments.deepspeed_keys import REFUSED, SHARED, TOP_LEVEL, show
from ds_trainer.arguments.schema import RunSettings
from ds_trainer.arguments.sources import Located
from ds_trainer.errors import Problem

ALIASES = {
    "cutoff_len": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "max_length": "data.seq_len",
    "sequence_len": "data.seq_len",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "attn_implementation": "model.attention",
    "per_device_train_batch_size": "train.micro_batch_size",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "bf16": "train.precision: bf16",
    "fp16": "train.precision: fp16",
    "output_dir": "checkpoint.folder",
    "neftune_noise_alpha": "train.neftune_alpha",
    "router_aux_loss_coef": "objective.router_weight",
    "loss_type": "objective.loss",
    "precompute_ref_log_probs": "objective.reference: precomputed",
    "full_determinism": "train.deterministic",
    "simpo_gamma": "objective.gamma",
    "load_in_4bit": "model.quantize: nf4",
    "bnb_4bit_quant_type": "model.quantize: nf4",
    "quantization_bit": "model.quantize: nf4",
    "quant_bits": "model.quantize: nf4",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "checkpoint.resume",
    "logging_steps": "monitor.log_every_steps",
    "eval_steps": "evaluate.every_steps",
    "lora_r": "adapter.lora.rank",
    "r": "adapter.lora.rank",
    "lora_alpha": "adapter.lora.alpha",
    "dataset": "data.sources",
    "datasets": "data.sources",
}
"""What other trainers call a setting of ours: for the hint under an unknown key."""


def validate(run: Located, engine_names: dict[str, str]) -> tuple[RunSettings | None, list[Problem]]:
    """Validate the merged run tree against the schema.

    Args:
        run: what was written, shared settings of the JSON included.
        engine_names: the DeepSpeed name of each setting that came from there.

    Returns:
        The settings, or None and what is wrong with them.
    """
    try:
        return RunSettings.model_validate(run.plain()), []
    except ValidationError as error:
        return None, [_explain(run, detail, engine_names) for detail in error.errors()]


def _explain(run: Located, detail: Any, engine_names: dict[str, str]) -> Problem:
    """Turn one pydantic error into a problem with a line, in the language the value was written in."""
    # A union's error carries the tried branch in its location: keep what exists in the tree.
    node, path = run, []
    for part in detail["loc"]:
        child = None
        if isinstance(node.value, dict):
            child = node.value.get(part)
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
        if child is None:
            break
        node = child
        path.append(str(part))
    name = ".".join(path)
    kind, where = detail["type"], str(node.origin)
    if kind == "missing":
        full = ".".join([*path, str(detail["loc"][-1])])
        return Problem(where=where, what=f"`{full}` is missing; {_example(full)}")
    shown = f"DeepSpeed's `{engine_names[name]}`" if name in engine_names else name
    if kind == "extra_forbidden":
        return Problem(where=where, what=f"unknown setting `{name}`; {_nearest(name)}")
    if node.value is None:
        return Problem(where=where, what=f"{shown} = null, but it needs a value; {_example(name)}")
    if len(detail["loc"]) > len(path):  # a branch of a union: one line says what all branches want
        return Problem(where=where, what=f"{shown} = {show(node)} does not fit; {_example(name)}")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return Problem(where=where, what=f"{shown} = {show(node)} must be a block of settings; {_example(name)}")
    return Problem(where=where, what=f"{shown} = {show(node)} {_rule(detail, node, name)}")


def _rule(detail: Any, node: Located, name: str) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    value = node.value
    if kind in ("int_type", "int_from_float", "float_type"):
        number = _number(value)
        whole = kind != "float_type"
        if number is None or (whole and number != int(number)):
            return f"is not {'a whole number' if whole else 'a number'}"
        text = str(int(number)) if whole else str(value)
        return f"is text; write {text} without quotes" if isinstance(value, str) else f"is not a whole number; write {text}"
    if kind == "bool_type":
        word = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}.get(
            str(value).lower()
        )
        return f"must be true or false{f': write {word}, without quotes' if word else ''}"
    if kind == "string_type":
        return "must be text" if isinstance(value, (dict, list)) else f'must be text; put it in quotes: "{show(node)}"'
    if kind == "list_type":
        return f"must be a list in brackets; {_example(name)}"
    if kind in ("too_short", "string_too_short"):
        return f"is too short; {_example(name)}" if value else f"must not be empty; {_example(name)}"
    if kind == "too_long":
        return f"is too long; {_example(name)}"
    if kind in ("literal_error", "enum"):
        expected = str(context.get("expected", "")).replace(" or ", ", ")
        if "," not in expected:
            return f"can only be {expected}; {_example(name)}"
        near = difflib.get_close_matches(str(value), [word.strip("' ") for word in expected.split(",")], n=1)
        return f"must be one of {expected}" + (f"; did you mean `{near[0]}`?" if near else "")
    for bound, word in (("ge", "at least"), ("gt", "greater than"), ("le", "at most"), ("lt", "less than")):
        if bound in context:
            return f"must be {word} {context[bound]:g}"
    return f"is not valid: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _number(value: Any) -> float | None:
    try:
        number = None if isinstance(value, (bool, dict, list)) else float(value)
    except (ValueError, OverflowError):
        return None
    return number if number is not None and math.isfinite(number) else None


@functools.cache
def _fields(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every setting of the schema by dotted path, with its field."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        found[path] = field
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                found |= _fields(candidate, path)
    return found


def _nearest(name: str) -> str:
    known = _fields(RunSettings)
    section, _, key = name.rpartition(".")
    section = ".".join(part for part in section.split(".") if not part.isdigit())  # the items of a list share their settings
    if name in known:
        return f"a dot stands for a block on the command line only; write `{key}` inside the block `{section}:`"
    ours = next((each.setting for each in SHARED if each.key == key), ALIASES.get(key))
    if ours:
        return f"here it is called `{ours}`"
    siblings = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == section]
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"did you mean `{f'{section}.' if section else ''}{near[0]}`?"
    if key in TOP_LEVEL or key in REFUSED:
        return f"it is a key of DeepSpeed's: write it in the section `deepspeed`, as `deepspeed.{key}`"
    homes = {path.rpartition(".")[2]: path for path in reversed(known)}
    elsewhere = difflib.get_close_matches(key, homes, n=1, cutoff=0.8)
    if elsewhere:
        return f"it belongs in another place: `{homes[elsewhere[0]]}`"
    return f"known there: {', '.join(siblings)}" if siblings else "there is no such section"


_EXAMPLES = {
    "model": "write for example\n      model:\n        path: Qwen/Qwen3-0.6B",
    "model.config": "write the path of a config.json, or a block with `model_type: llama` and its other fields",
    "data": "write for example\n      data:\n        sources: [{path: data/train.jsonl}]\n        seq_len: 1024",
    "data.sources": "write for example `sources: [{path: data/train.jsonl}]`",
    "data.seq_len": "write for example `seq_len: 1024`",
    "train": "write for example\n      train:\n        stage: sft",
    "train.stage": "write `stage: pretrain`, `sft`, `dpo`, `orpo`, `simpo`, `kto` or `reward`",
    "train.betas": "write for example `betas: [0.9, 0.95]`",
    "evaluate": "write for example\n      evaluate:\n        sources: [{path: data/held_out.jsonl}]",
    "evaluate.generate": "write for example `generate: {prompts: data/prompts.jsonl}`",
    "evaluate.sets": "write for example `sets: {code: [{path: data/code.jsonl}]}`; names of letters, digits, `_` and `-`",
    "evaluate.sources": "write for example `sources: [{path: data/held_out.jsonl}]`",
    "deepspeed": "write for example\n      deepspeed:\n        config: ds_configs/zero2.json",
    "checkpoint": "write for example\n      checkpoint:\n        folder: out/my-run",
    "checkpoint.folder": "write for example `folder: out/my-run`",
    "checkpoint.resume": "write `resume: auto`, `resume: never` or the path of a checkpoint",
    "adapter": "write for example\n      adapter:\n        lora: {rank: 16}",
    "adapter.lora": "write for example `lora: {rank: 16}`",
    "adapter.lora.target_modules": "write `all-linear` or for example `[q_proj, v_proj]`",
    "adapter.lora.modules_to_save": "write for example `[embed_tokens, lm_head]`",
    "adapter.freeze": "write for example `freeze: {last_layers: 4}`",
    "adapter.freeze.train": 'write patterns, for example `["*.mlp.*"]`',
    "train.no_weight_decay": 'write patterns, for example `["*embed_tokens*"]`',
    "model.quantize": "with 8 bits, bitsandbytes computes one thing in training and another in evaluation",
    "model.gradient_checkpointing": "write `true`, `selective`, or a number n from 2 on: every n-th layer",
    "monitor.wandb": "write for example `wandb: {enabled: true, project: my-project}`",
    "monitor.tensorboard": "write for example `tensorboard: {enabled: true, output_path: out/tensorboard}`",
    "monitor.csv_monitor": "write for example `csv_monitor: {enabled: true, output_path: out/csv}`",
}


def _example(path: str) -> str:
    if path.startswith("evaluate.sets.") and path.count(".") == 2:
        return _EXAMPLES["evaluate.sets"]
    if path.startswith(("data.sources.", "evaluate.sources.", "evaluate.sets.")):
        return "write for example `{path: data/train.jsonl}`"
    return _EXAMPLES.get(path, "`ds_trainer check --schema` says what may stand there")
