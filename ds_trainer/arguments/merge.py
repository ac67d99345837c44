"""From the run file, the DeepSpeed JSON and the command line to one value a setting, each with its origin.

The order, weakest first: defaults, DeepSpeed JSON, run file, command line. A setting that can be said in both languages
is one setting: two explicit values that differ are an error, which only the command line may overrule. A default is no
statement and contradicts nobody. How and why: docs/design/merging-settings.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_trainer.arguments.constraints import View, check_constraints
from ds_trainer.arguments.deepspeed_keys import (
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
    "gradient_clipping": "train.max_grad_norm",
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
    run = _collect(problems, lambda: read_yaml(config))
    command_line = _collect(problems, lambda: _command_line(overrides, resume)) or Located({}, Origin("--set"))
    run = overlay(run, command_line) if run is not None else None

    stated_json = run.find("deepspeed.config") if run is not None else None
    path = str(deepspeed) if deepspeed else stated_json.value if stated_json is not None else None
    json_tree = Located({}, DEFAULT)
    if isinstance(path, str):
        json_tree = _collect(problems, lambda: read_json(path)) or json_tree
    if run is None:
        problems += check_keys(json_tree)
        raise ArgumentsError(problems)

    section = run.find("deepspeed") or Located({}, DEFAULT)
    if isinstance(section.value, dict):
        own_keys = {key: node for key, node in section.value.items() if key != "config"}
        engine = overlay(json_tree, Located(own_keys, section.origin))
    else:
        engine = json_tree

    run, engine_names, conflicts = _unite(run, engine)
    problems += conflicts
    settings, invalid = _validate(run, engine_names)
    problems += invalid + check_keys(engine) + leftover_autos(engine)
    if settings is not None and not problems:
        problems += check_constraints(View(settings, run, engine))
    if problems:
        raise ArgumentsError(sorted(problems, key=_by_place))
    assert settings is not None
    origins = {name: node.origin for name, node in run.leaves() if not name.startswith("deepspeed.")}
    return Resolved(
        settings=settings,
        deepspeed=engine,
        origins=origins,
        config_path=Path(config),
        deepspeed_path=path if isinstance(path, str) else None,
    )


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
    return Located(merged, weak.origin if weak.value else strong.origin)


def _command_line(overrides: Iterable[str], resume: str | None) -> Located:
    tree = Located({}, Origin("--set"))
    problems: list[Problem] = []
    for text in overrides:
        stated = _collect(problems, lambda text=text: read_override(text))  # type: ignore[misc]
        if stated is not None:
            tree = overlay(tree, _nest(*stated))
    if problems:
        raise ArgumentsError(problems)
    if resume is not None:
        tree = overlay(tree, _nest("checkpoint.resume", Located(resume, Origin("--resume"))))
    return tree


def _nest(path: str, node: Located) -> Located:
    for key in reversed(path.split(".")):
        node = Located({key: node}, node.origin)
    return node


def _unite(run: Located, engine: Located) -> tuple[Located, dict[str, str], list[Problem]]:
    """Bring what the DeepSpeed keys say of shared settings into the run file's language.

    Returns:
        The run tree with those settings; the DeepSpeed name of each that came from there; conflicts.
    """
    stated: list[tuple[str, str, Located]] = []
    for each in SHARED:
        node = engine.find(each.key)
        if node is not None and node.value != "auto":
            stated.append((each.setting, each.key, node))
    if (precision := precision_of(engine)) is not None:
        stated.append(("train.precision", "fp16.enabled" if precision.value == "fp16" else "bf16.enabled", precision))
    scheduler = engine.find("scheduler.type")
    if scheduler is not None and scheduler.value in SCHEDULES and run.find("train.schedule") is None:
        stated.append(("train.schedule", "scheduler.type", Located(SCHEDULES[scheduler.value], scheduler.origin)))

    names: dict[str, str] = {}
    problems: list[Problem] = []
    for setting, key, theirs in stated:
        ours = run.find(setting)
        if ours is not None and ours.plain() != theirs.plain():
            loud = [_from_command_line(node) for node in (ours, theirs)]
            if loud[0] == loud[1]:
                what = (
                    f"{setting} = {show(ours)} contradicts DeepSpeed's `{key}` = {show(theirs)} ({theirs.origin}): they are "
                    f'one setting. Remove one of them, or write "auto" in the JSON.'
                )
                problems.append(Problem(where=str(ours.origin), what=what))
                continue
            if loud[0]:
                continue
        elif ours is not None:
            continue
        names[setting] = key
        section, _, _ = setting.partition(".")
        if (existing := run.find(section)) is None or isinstance(existing.value, dict):
            run = overlay(run, _nest(setting, theirs))
    return run, names, problems


def _from_command_line(node: Located) -> bool:
    return node.origin.source.startswith("--")


def _validate(run: Located, engine_names: dict[str, str]) -> tuple[RunSettings | None, list[Problem]]:
    try:
        return RunSettings.model_validate(run.plain()), []
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            problem = _explain(run, detail, engine_names)
            if problem not in problems:
                problems.append(problem)
        return None, problems


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
    kind = detail["type"]
    if kind == "missing":
        missing = str(detail["loc"][-1])
        full = f"{name}.{missing}" if name else missing
        return Problem(where=str(node.origin), what=f"`{full}` is missing; {_example(full)}")
    shown = f"DeepSpeed's `{engine_names[name]}`" if name in engine_names else name
    if kind == "extra_forbidden":
        return Problem(where=str(node.origin), what=f"unknown setting `{name}`; {_nearest(name)}")
    if kind in ("model_type", "model_attributes_type", "dict_type") and isinstance(node.value, (str, int, float, list)):
        return Problem(where=str(node.origin), what=f"`{shown}` = {show(node)} must be a block of settings: {_example(name)}")
    if node.value is None:
        return Problem(where=str(node.origin), what=f"`{shown}` has no value; write one, or remove the line")
    return Problem(where=str(node.origin), what=f"{shown} = {show(node)} {_rule(detail, node)}")


def _rule(detail: Any, node: Located) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    value = node.value
    if kind in ("int_type", "float_type"):
        wanted = "a whole number" if kind == "int_type" else "a number"
        if isinstance(value, str) and value.replace(".", "", 1).lstrip("-").isdigit():
            return f"is text; it must be {wanted}: write {value} without quotes"
        return f"is not {wanted}"
    if kind == "bool_type":
        word = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(str(value).lower())
        return f"must be true or false{f': write {word}' if word else ''}"
    if kind == "string_type":
        return "must be text; put it in quotes"
    if kind in ("literal_error", "enum"):
        expected = str(context.get("expected", ""))
        near = difflib.get_close_matches(str(value), [word.strip("' ") for word in expected.split(",")], n=1)
        return f"must be one of {expected.replace(' or ', ', ')}" + (f"; did you mean `{near[0]}`?" if near else "")
    for bound, word in (("ge", "at least"), ("gt", "greater than"), ("le", "at most"), ("lt", "less than")):
        if bound in context:
            return f"must be {word} {context[bound]:g}"
    return f"is not valid: {detail['msg'][0].lower()}{detail['msg'][1:]}"


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
    if key in ALIASES:
        return f"here it is called `{ALIASES[key]}`"
    siblings = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == section]
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"did you mean `{f'{section}.' if section else ''}{near[0]}`?"
    elsewhere = [path for path in known if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"it belongs in another section: `{elsewhere[0]}`"
    if key in TOP_LEVEL or any(key == each.key for each in SHARED):
        return f"it is a key of DeepSpeed's: write it in the section `deepspeed`, as `deepspeed.{key}`"
    return f"known there: {', '.join(siblings)}" if siblings else "there is no such section"


_EXAMPLES = {
    "model": "write for example\n      model:\n        path: Qwen/Qwen3-0.6B",
    "data": "write for example\n      data:\n        sources: [{path: data/train.jsonl}]\n        seq_len: 1024",
    "data.sources": "write for example `sources: [{path: data/train.jsonl}]`",
    "data.seq_len": "write for example `seq_len: 1024`",
    "train": "write for example\n      train:\n        stage: sft",
    "train.stage": "write `stage: pretrain` or `stage: sft`",
    "checkpoint": "write for example\n      checkpoint:\n        folder: out/my-run",
    "checkpoint.folder": "write for example `folder: out/my-run`",
    "adapter.lora": "write for example `lora: {rank: 16}`",
}


def _example(path: str) -> str:
    return _EXAMPLES.get(path, "see `ds_trainer check --schema`")


def _collect(problems: list[Problem], read: Any) -> Any:
    try:
        return read()
    except ArgumentsError as error:
        problems.extend(error.problems)
        return None
