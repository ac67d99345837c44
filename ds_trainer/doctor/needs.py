"""What a run file asks of every host: paths, disk, compiled ops."""

from __future__ import annotations

from dataclasses import dataclass

from ds_trainer.arguments.engine_config import needed_ops
from ds_trainer.arguments.merge import Resolved
from ds_trainer.check import named_paths, on_the_hub


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What every host must have for this run."""

    paths: dict[str, str]
    """Path or glob -> the setting that names it. What looks like a hub id and is not on this machine is left out."""
    hub_ids: dict[str, str]
    """The same of what will be fetched from the hub."""
    run_folder: str
    keep: int
    """Checkpoints that lie on the disk at the same time, at most."""
    max_bytes: float | None = None
    """What those may take that are complete, by `checkpoint.max_gib`."""
    ops: dict[str, tuple[str, ...]]
    """Device type -> DeepSpeed's ops that are compiled for this run."""
    nvme: bool
    """Optimizer states or parameters are kept on a disk."""


def needs_of(resolved: Resolved) -> Needs:
    """Read the needs off the settings in force; only looks whether paths exist."""
    settings = resolved.settings
    named = named_paths(resolved)
    hub = {path: name for name, path in named if on_the_hub(path)}
    files = {str(resolved.config_path): "--config"}
    if resolved.deepspeed_path:
        files[str(resolved.deepspeed_path)] = "deepspeed.config"
    files.update({path: name for name, path in named if path not in hub})
    checkpoint = settings.checkpoint
    keep = checkpoint.keep_last + checkpoint.keep_best + 1  # one is written before one is removed
    if checkpoint.keep_every_steps and settings.train.max_steps:
        keep += settings.train.max_steps // checkpoint.keep_every_steps
    ops = {device: needed_ops(resolved, device) for device in ("cuda", "cpu")}
    return Needs(
        paths=files,
        hub_ids=hub,
        run_folder=checkpoint.folder,
        keep=keep,
        max_bytes=checkpoint.max_gib * 2**30 if checkpoint.max_gib else None,
        ops=ops,
        nvme="async_io" in ops["cpu"],
    )


def checkpoint_bytes(resolved: Resolved) -> tuple[int, str]:
    """About what one checkpoint takes, and how that was counted; the model is built without memory for its weights.

    Raises:
        ModelError: the model's config cannot be read here.
    """
    from ds_trainer.plan.memory import checkpoint_of
    from ds_trainer.plan.shape import read_shape

    settings = resolved.settings
    adapter = settings.adapter.model_dump_json() if settings.adapter else "null"
    trained = read_shape(
        settings.model.model_dump_json(), adapter, settings.train.precision, settings.train.stage == "reward"
    ).trained
    size = int(sum(checkpoint_of(trained).values()))
    return size, f"{trained:,} trained parameters x {size // max(1, trained)} bytes"
