"""From the run file, the DeepSpeed JSON and the command line to one value a setting, each with its origin.

The order, weakest first: defaults, DeepSpeed JSON, run file, command line. A setting that can be said in both languages
is one setting: two explicit values that differ are an error, which only the command line may overrule. A default is no
statement and contradicts nobody. How and why: docs/design/merging-settings.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_trainer.arguments.constraints import View, check_constraints
from ds_trainer.arguments.deepspeed_keys import (
    SCHEDULES,
    SHARED,
    check_keys,
    leftover_autos,
    precision_of,
    show,
)
from ds_trainer.arguments.explain import validate
from ds_trainer.arguments.schema import RunSettings
from ds_trainer.arguments.sources import DEFAULT, Located, Origin, read_json, read_override, read_yaml
from ds_trainer.errors import ArgumentsError, Problem


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
            below = run.find(path)
            if node.value == {} and below is not None and below.value:
                what = f"`{path}={{}}` is laid on top of the block that is there, and changes nothing. "
                problems.append(Problem(where="command line", what=f"{what}{path}=null takes the block away."))
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
    settings, invalid = validate(run, engine_names)
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


def _collect(problems: list[Problem], read: Any) -> Any:
    try:
        return read()
    except ArgumentsError as error:
        problems.extend(error.problems)
        return None
