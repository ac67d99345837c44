"""From the run file, the DeepSpeed JSON and the command line to one value a setting, each with its origin.

The order, weakest first: defaults, DeepSpeed JSON, run file, command line. A setting that can be said in both languages
is one setting: two explicit values that differ are an error, which only the command line may overrule. A default is no
statement and contradicts nobody. How and why: docs/design/merging-settings.md.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_trainer.arguments.constraints import View, check_constraints
from ds_trainer.arguments.deepspeed_keys import (
    REFUSED,
    SCHEDULES,
    SHARED,
    TOP_LEVEL,
    check_keys,
    leftover_autos,
    precision_of,
    show,
)
from ds_trainer.arguments.schema import RunSettings
from ds_trainer.arguments.sources import DEFAULT, Located, Origin, read_json, read_override, read_yaml
from ds_trainer.errors import ArgumentsError, Problem

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """The settings in force and where each came from. Frozen; the same on all ranks."""

    settings: RunSettings
    deepspeed: Located
    """The DeepSpeed keys as written, without the run file's `deepspeed.config`; shared settings included."""
    origins: dict[str, Origin]
    """By dotted path, for every leaf of `settings`; DeepSpeed's own keys carry their origin in `deepspeed`."""
    config_path: Path
    """The run file that was read."""
    deepspeed_path: str | None
    """The DeepSpeed JSON that was read."""

    def origin(self, path: str) -> Origin:
        """Where the setting at a dotted path was stated, or `default`."""
        return self.origins.get(path, DEFAULT)


def resolve(
    config: str | Path,
    *,
    deepspeed: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: str | None = None,
) -> Resolved:
    """Read, merge and validate everything the user wrote; fast, without importing torch.

    The nested DeepSpeed blocks have a second check, `deepspeed_keys.validate_blocks`, which imports DeepSpeed.

    Args:
        config: path of the run file.
        deepspeed: path of a DeepSpeed JSON; replaces `deepspeed.config` of the run file.
        overrides: `section.key=value` texts of the command line.
        resume: value of `--resume`.

    Raises:
        ArgumentsError: with every problem that was found, each with file and line.
    """
    problems: list[Problem] = []
    run = _collect(problems, lambda: read_yaml(config, problems))
    command_line = _command_line(overrides, deepspeed, resume, problems)
    if run is not None:
        for path, node in command_line:
            run = overlay(run, _nest(path, node))
        stated_json = run.find("deepspeed.config")
    else:
        stated_json = next((node for path, node in command_line if path == "deepspeed.config"), None)

    json_path = stated_json.value if stated_json is not None and isinstance(stated_json.value, str) else None
    json_tree = Located({}, DEFAULT)
    if json_path:
        json_tree = _collect(problems, lambda: read_json(json_path, problems)) or json_tree
    if run is None:
        raise ArgumentsError(sorted([*problems, *check_keys(json_tree), *leftover_autos(json_tree)], key=_by_place))

    engine = json_tree
    section = run.find("deepspeed")
    if section is not None and isinstance(section.value, dict):
        own_keys = {key: node for key, node in section.value.items() if key != "config"}
        engine = overlay(json_tree, Located(own_keys, section.origin))

    run, engine_names, conflicts = _unite(run, engine)
    engine = _without_overruled_schedule(run, _with_monitors(run, engine))
    settings, invalid = _validate(run, engine_names)
    problems += conflicts + invalid + check_keys(engine, typed_elsewhere=engine_names.values()) + leftover_autos(engine)
    if settings is not None and not problems:
        problems += check_constraints(View(settings, run, engine))
    if problems:
        raise ArgumentsError(sorted(problems, key=_by_place))
    assert settings is not None
    origins = {name: node.origin for name, node in run.leaves() if name == "deepspeed.config" or not _is_engine(name)}
    return Resolved(
        settings=settings,
        deepspeed=engine,
        origins=origins,
        config_path=Path(config),
        deepspeed_path=json_path,
    )


def _is_engine(name: str) -> bool:
    return name.partition(".")[0] == "deepspeed"


def _by_place(problem: Problem) -> tuple[str, int]:
    source, _, line = problem.where.rpartition(":")
    return (source, int(line)) if line.isdigit() else (problem.where, 0)


def overlay(weak: Located, strong: Located) -> Located:
    """Put one tree on top of another: mappings are merged key by key, anything else is replaced."""
    if not isinstance(weak.value, dict) or not isinstance(strong.value, dict):
        return strong
    merged = dict(weak.value)
    for key, node in strong.value.items():
        merged[key] = overlay(merged[key], node) if key in merged else node
    return Located(merged, strong.origin if weak.origin == DEFAULT else weak.origin)


def _command_line(
    overrides: Iterable[str], deepspeed: str | Path | None, resume: str | None, problems: list[Problem]
) -> list[tuple[str, Located]]:
    stated: list[tuple[str, Located]] = []
    for text in overrides:
        name, node = _collect(problems, lambda text=text: read_override(text, problems)) or ("", None)
        if node is not None:
            stated.append((name, node))
    if deepspeed is not None:
        stated.append(("deepspeed.config", Located(str(deepspeed), Origin("--deepspeed"))))
    if resume is not None:
        stated.append(("checkpoint.resume", Located(resume, Origin("--resume"))))
    return stated


def _nest(path: str, node: Located) -> Located:
    for key in reversed(path.split(".")):
        node = Located({key: node}, node.origin)
    return node


def _has_room(tree: Located, path: str) -> bool:
    """Whether a value can be put at a path: where a block has to be stands a block or nothing."""
    blocks = [tree.find(path[:at]) for at, letter in enumerate(path) if letter == "."]
    return all(block is None or block.value is None or isinstance(block.value, dict) for block in blocks)


def _unite(run: Located, engine: Located) -> tuple[Located, dict[str, str], list[Problem]]:
    """Bring what the DeepSpeed keys say of shared settings into the run file's language.

    Returns:
        The run tree with those settings; the DeepSpeed name of each that came from there; conflicts.
    """
    stated: list[tuple[str, str, Located]] = []
    for each in SHARED:
        node = engine.find(each.key)
        for key, leaf in node.leaves(each.key) if node is not None else ():  # a block is as many settings as it has leaves
            if leaf.value not in ("auto", None):
                stated.append((each.setting + key.removeprefix(each.key), key, leaf))
    stated += [("train.precision", *each) for each in precision_of(engine, run.find("train.precision"))]
    scheduler = engine.find("scheduler.type")
    if scheduler is not None and isinstance(scheduler.value, str) and scheduler.value in SCHEDULES:
        stated.append(("train.schedule", "scheduler.type", Located(SCHEDULES[scheduler.value], scheduler.origin)))

    names: dict[str, str] = {}
    problems: list[Problem] = []
    for setting, key, theirs in stated:
        ours = run.find(setting)
        if ours is not None and ours.value is not None:  # null says nothing
            loud, theirs_loud = _from_command_line(ours), _from_command_line(theirs)
            if ours.plain() == theirs.plain() or (loud and not theirs_loud):
                continue
            if loud == theirs_loud:
                problems.append(_conflict(engine, setting, names.get(setting), ours, key, theirs))
                continue
        if _has_room(run, setting):
            names[setting] = key
            run = overlay(run, _nest(setting, theirs))
    return run, names, problems


def _conflict(engine: Located, setting: str, our_key: str | None, ours: Located, key: str, theirs: Located) -> Problem:
    first, second = (engine.find(our_key) if our_key else None) or ours, engine.find(key) or theirs
    fix = "Remove one of them" if key == "scheduler.type" else 'Remove one of them, or write "auto" for DeepSpeed\'s'
    what = (
        f"{f'DeepSpeed `{our_key}`' if our_key else setting} = {show(first)} contradicts DeepSpeed's "
        f"`{key}` = {show(second)} ({theirs.origin}): they are one setting. {fix}."
    )
    return Problem(where=str(ours.origin), what=what)


def _with_monitors(run: Located, engine: Located) -> Located:
    """With the monitor blocks of the run file, so that they are checked like those of the JSON."""
    blocks = {each.key: run.find(each.setting) for each in SHARED if each.setting == f"monitor.{each.key}"}
    found = {key: block for key, block in blocks.items() if block is not None and isinstance(block.value, dict)}
    return overlay(engine, Located(found, DEFAULT))


def _without_overruled_schedule(run: Located, engine: Located) -> Located:
    """Without the block `scheduler` when the command line asks for another schedule."""
    ours, theirs = run.find("train.schedule"), engine.find("scheduler.type")
    if ours is None or theirs is None or not _from_command_line(ours) or _from_command_line(theirs):
        return engine
    if isinstance(theirs.value, str) and SCHEDULES.get(theirs.value) == ours.value:
        return engine
    return Located({key: node for key, node in engine.value.items() if key != "scheduler"}, engine.origin)


def _from_command_line(node: Located) -> bool:
    return node.origin.source.startswith("--")


def _validate(run: Located, engine_names: dict[str, str]) -> tuple[RunSettings | None, list[Problem]]:
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
    "train.stage": "write `stage: pretrain` or `stage: sft`",
    "train.betas": "write for example `betas: [0.9, 0.95]`",
    "evaluate": "write for example\n      evaluate:\n        sources: [{path: data/held_out.jsonl}]",
    "evaluate.sources": "write for example `sources: [{path: data/held_out.jsonl}]`",
    "deepspeed": "write for example\n      deepspeed:\n        config: ds_configs/zero2.json",
    "checkpoint": "write for example\n      checkpoint:\n        folder: out/my-run",
    "checkpoint.folder": "write for example `folder: out/my-run`",
    "checkpoint.resume": "write `resume: auto`, `resume: never` or the path of a checkpoint",
    "adapter": "write for example\n      adapter:\n        lora: {rank: 16}",
    "adapter.lora": "write for example `lora: {rank: 16}`",
    "adapter.lora.target_modules": "write `all-linear` or for example `[q_proj, v_proj]`",
    "monitor.wandb": "write for example `wandb: {enabled: true, project: my-project}`",
    "monitor.tensorboard": "write for example `tensorboard: {enabled: true, output_path: out/tensorboard}`",
    "monitor.csv_monitor": "write for example `csv_monitor: {enabled: true, output_path: out/csv}`",
}


def _example(path: str) -> str:
    if path.startswith(("data.sources.", "evaluate.sources.")):
        return "write for example `{path: data/train.jsonl}`"
    return _EXAMPLES.get(path, "`ds_trainer check --schema` says what may stand there")


def _collect(problems: list[Problem], read: Any) -> Any:
    try:
        return read()
    except ArgumentsError as error:
        problems.extend(error.problems)
        return None
