"""The settings in force as rows and as JSON: each value with where it came from. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ds_trainer.arguments.deepspeed_keys import SHARED
from ds_trainer.arguments.engine_config import EngineConfig
from ds_trainer.arguments.merge import Resolved


def setting_rows(resolved: Resolved) -> list[tuple[str, Any, str]]:
    """(dotted path, value, origin) of every setting of the run file, defaults included; of `deepspeed` only the JSON's path."""
    rows = []
    settings = resolved.settings.model_dump(mode="json", exclude={"deepspeed"})
    settings["deepspeed"] = {"config": resolved.deepspeed_path}
    for holder in (settings["data"], settings["evaluate"] or {}, (settings["evaluate"] or {}).get("sets", {})):
        for name, value in holder.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):  # what a source does not say has no effect
                holder[name] = [{k: v for k, v in each.items() if v not in (None, {})} for each in value]
    for path, value in flatten(settings):
        origin = next((resolved.origins[each] for each in _upwards(path) if each in resolved.origins), None)
        rows.append((path, value, "default" if origin is None else str(origin)))
    return rows


def engine_rows(resolved: Resolved, engine: EngineConfig) -> list[tuple[str, Any, str]]:
    """(dotted path, value, origin) of every key that DeepSpeed is handed.

    The origin of a value nobody wrote is the setting it stands for, or how it was computed.
    """
    rows = []
    for path, value in flatten(engine.config):
        node = resolved.deepspeed.find(path)
        if path in engine.reasons:
            origin = engine.reasons[path]
        elif (setting := _setting_of(path)) is not None:
            origin = setting
        elif node is not None and node.plain() == value:
            origin = str(node.origin)
        else:
            origin = "default"
        rows.append((path, value, origin))
    return rows


def _setting_of(path: str) -> str | None:
    if path in ("bf16.enabled", "fp16.enabled"):
        return "train.precision"
    owners = (each for each in SHARED if f"{path}.".startswith(f"{each.key}."))
    return next((each.setting + path.removeprefix(each.key) for each in owners), None)


def resolved_as_json(resolved: Resolved) -> dict[str, Any]:
    """What `resolved.json` holds, and what the ranks compare."""
    rows = setting_rows(resolved)
    written = [(f"deepspeed.{path}", node.plain(), str(node.origin)) for path, node in resolved.deepspeed.leaves() if path]
    return {path: {"value": value, "origin": origin} for path, value, origin in rows + written}


def flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf; a list or an empty mapping is a leaf."""
    for name, value in fields.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping) and value:
            yield from flatten(value, path)
        else:
            yield path, value


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
