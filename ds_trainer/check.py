"""The story of a check: the settings in force, each with its origin, and the batch arithmetic. No launcher, no GPU, no data."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable
from typing import Any

from ds_trainer.arguments.engine_config import build_engine_config, optimizer_kind, read_hidden_size, solve_run_batch
from ds_trainer.arguments.merge import Resolved
from ds_trainer.arguments.report import engine_rows, setting_rows

Row = tuple[str, Any, str]

_HUB_ID = re.compile(r"[\w-]+/[\w-]+(\.\d[\w.-]*)?")
"""What may be `owner/name` on the hub rather than a path: a dot is part of a version, not of a suffix."""


def check_rows(resolved: Resolved, world_size: int, device_type: str) -> tuple[list[Row], list[Row], str]:
    """The settings, the keys DeepSpeed is handed, and the batch arithmetic in a line.

    Raises:
        ArgumentsError: the batch arithmetic does not work out at this number of ranks.
    """
    batch = solve_run_batch(resolved, world_size)
    engine = build_engine_config(
        resolved, batch, hidden_size=read_hidden_size(resolved), whole_layer=None, device_type=device_type
    )
    return setting_rows(resolved), engine_rows(resolved, engine), str(batch)


def as_text(resolved: Resolved, world_size: int, device_type: str) -> str:
    """The check as people read it."""
    settings, engine, batch = check_rows(resolved, world_size, device_type)
    optimizer = optimizer_kind(resolved, device_type)
    return "\n".join(
        [
            "Settings in force, and where each comes from",
            *_aligned(settings),
            "",
            "What DeepSpeed is handed",
            *_aligned(engine),
            f"  optimizer: {optimizer} on {device_type}",
            "",
            f"Batch: {batch}",
            *missing_files(resolved),
        ]
    )


def named_paths(resolved: Resolved) -> list[tuple[str, str]]:
    """What the run file names of files, folders, globs and hub ids: (setting, path)."""
    settings = resolved.settings
    config = settings.model.config if isinstance(settings.model.config, str) else None
    named = {"model.tokenizer": settings.model.tokenizer, "model.path": settings.model.path, "model.config": config}
    paths = [(name, path) for name, path in named.items() if path]
    paths += [("data.sources", source.path) for source in settings.data.sources]
    if settings.lora is not None and settings.lora.path is not None:
        paths.append(("adapter.lora.path", settings.lora.path))
    if settings.evaluate and settings.evaluate.generate:
        paths.append(("evaluate.generate.prompts", settings.evaluate.generate.prompts))
    for name, sources in (settings.evaluate.held_out if settings.evaluate else {}).items():
        paths += [(f"evaluate.sets.{name}" if name else "evaluate.sources", source.path) for source in sources]
    return paths


def on_the_hub(path: str) -> bool:
    """Whether a path (or glob) is not on this machine and may be `owner/name` on the hub."""
    return not glob.glob(path) and _HUB_ID.fullmatch(path) is not None


def missing_files(resolved: Resolved) -> list[str]:
    """What the run file names and this machine does not have: no error, since a check may run elsewhere than the run."""
    missing = [
        f"  {name}: {path}"
        for name, path in named_paths(resolved)
        if not glob.glob(path) and (name in ("adapter.lora.path", "evaluate.generate.prompts") or not on_the_hub(path))
    ]
    return ["", "Not on this machine (paths start from the current folder):", *missing] if missing else []


def as_json(resolved: Resolved, world_size: int, device_type: str) -> dict[str, Any]:
    """The check for machines."""
    settings, engine, _ = check_rows(resolved, world_size, device_type)
    batch = solve_run_batch(resolved, world_size)
    return {
        "settings": {path: {"value": value, "origin": origin} for path, value, origin in settings},
        "deepspeed": {path: {"value": value, "origin": origin} for path, value, origin in engine},
        "optimizer": optimizer_kind(resolved, device_type),
        "batch": {
            "micro_batch_size": batch.micro_batch_size,
            "gradient_accumulation_steps": batch.gradient_accumulation_steps,
            "data_parallel_size": batch.data_parallel_size,
            "global_batch_size": batch.global_batch_size,
        },
    }


def _aligned(rows: Iterable[Row]) -> list[str]:
    shown = [(path, _short(value), origin) for path, value, origin in rows]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    return [f"  {path:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for path, value, origin in shown]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else "-" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else text[:45] + "..."
