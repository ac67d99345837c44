"""How a run is saved and how it goes on: what a checkpoint holds besides slices, and what it must have in common with a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from ds_trainer import comm, faults
from ds_trainer.arguments.engine_config import offload_device, written_optimizer, zero_stage
from ds_trainer.assemble import Prepared, evaluate_rows
from ds_trainer.checkpoint import manager
from ds_trainer.checkpoint.keep import Keep
from ds_trainer.checkpoint.saver import Saved, Saver
from ds_trainer.checkpoint.slices import SliceReader
from ds_trainer.data.loader import Windows
from ds_trainer.data.sources import Report
from ds_trainer.engine.wrapper import Engine
from ds_trainer.errors import CheckpointError, ResumeError
from ds_trainer.monitor.recorder import Recorder
from ds_trainer.monitor.run_folder import RunFolder
from ds_trainer.protocols import ModelBatch
from ds_trainer.state import TrainState

PROBE_ROWS = 16
"""Rows whose loss is kept in every checkpoint, so that a resume and an export can prove that they compute the same."""
_WHY_PART = {
    "max_steps": " (A schedule that falls ends at max_steps, so only with train.schedule=constant may it grow. To train "
    "longer, export the run and start a new one from the export.)"
}
"""Why a setting that differs is part of what a checkpoint continues, where that may surprise."""
PROBE_TOLERANCE = 1e-3
"""How far a resumed engine's loss on them may be from the saved one, relative to it; on the same machine it is equal."""


class Saving:
    """Saves one run. Every method is collective: every rank must call it."""

    def __init__(
        self, prepared: Prepared, engine: Engine, folder: RunFolder, recorder: Recorder, windows: Windows[ModelBatch]
    ) -> None:
        """Take what is saved, and who is told."""
        self._prepared = prepared
        self._engine = engine
        self._recorder = recorder
        self._windows = windows
        wanted = prepared.resolved.settings.checkpoint
        keep = Keep(
            last=wanted.keep_last,
            every_steps=wanted.keep_every_steps,
            best=wanted.keep_best,
            max_bytes=None if wanted.max_gib is None else int(wanted.max_gib * 2**30),
        )
        self._saver = Saver(folder.checkpoints, keep, background=wanted.background)
        self._goes_on = wanted.on_failure == "continue"
        self.last_step: int | None = None
        """Of the newest checkpoint that was begun."""
        self._failed: CheckpointError | None = None
        """Why the newest one could not be written."""

    def save(self, state: TrainState, held_out_loss: float | None = None) -> None:
        """Begin to write a checkpoint of the step that is complete; the one before it is complete then.

        Args:
            state: how far the run has come.
            held_out_loss: of this step, when it was evaluated.
        """
        faults.point("saving")
        prepared, engine = self._prepared, self._engine
        self.finish()
        loss, num_targets = evaluate_rows(prepared, engine, prepared.data.probe_rows, PROBE_ROWS)
        lanes = {name: cursor for each in comm.gather_objects(self._windows.cursors) for name, cursor in each.items()}
        slices, rest = engine.snapshot(copy=self._saver.background)
        self._saver.start(
            state.step,
            slices,
            {
                "state": {**state.to_json(), "stream": lanes},
                "run": run_identity(prepared),
                "layout": engine_layout(prepared),
                "engine": rest,
                "probe": {"rows": PROBE_ROWS, "loss": loss, "num_targets": num_targets},
                "held_out_loss": held_out_loss,
                "settings": prepared.resolved.settings.model_dump(mode="json"),
            },
        )
        self.last_step = state.step
        self._recorder.stopped_for_save()

    def poll(self) -> None:
        """Say what became of the checkpoint that was being written, if that is known.

        Raises:
            CheckpointError: it could not be written, and the run shall end then.
        """
        self._take_in(self._saver.poll)

    def finish(self) -> None:
        """As `poll`, but waits for it."""
        self._take_in(self._saver.wait)

    def end(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: it could not be written, whatever `checkpoint.on_failure` says: nothing is left to go on with.
        """
        self.finish()
        if self._failed is not None:
            raise self._failed

    def _take_in(self, ask: Callable[[], Saved | None]) -> None:
        try:
            saved = ask()
        except CheckpointError as error:
            if not self._goes_on:
                raise
            self._failed = error
            self._recorder.not_saved(str(error))
        else:
            if saved is not None:
                self._failed = None
                self._recorder.saved(
                    step=saved.step,
                    path=str(saved.path),
                    num_bytes=saved.num_bytes,
                    seconds=saved.seconds,
                    untidy=saved.untidy,
                )


def resume(prepared: Prepared, engine: Engine, folder: RunFolder, report: Report) -> TrainState:
    """Continue from the checkpoint that the settings name, or start anew. Collective.

    Raises:
        ResumeError: the checkpoint belongs to another kind of run.
    """
    settings = prepared.resolved.settings
    if comm.rank() == 0:
        for name in manager.remove_leftovers(folder.checkpoints):
            report(f"removed {name}, which a killed start left unfinished")
    found = manager.find(folder.checkpoints, settings.checkpoint.resume, report, was_saved=folder.has_saved())
    if found is None:
        set_aside(folder, 0, report)
        if comm.rank() == 0:
            folder.event("started_anew")
        return TrainState()
    written, ours = found.manifest["run"], run_identity(prepared)
    for name, value in ours.items():
        if written.get(name) != value:
            raise ResumeError(
                f"{found.path} cannot be continued: it has {name} = {written.get(name)}, this run has {value}. "
                f"Start with the settings it was saved with, or start anew with --resume never.{_WHY_PART.get(name, '')}"
            )
    rest = found.manifest["engine"]
    reader = SliceReader(sorted(found.path / name for name in found.manifest["files"]))
    engine.restore(reader.read, rest)
    state = TrainState.from_json(found.manifest["state"])
    probe = found.manifest["probe"]
    loss, _ = evaluate_rows(prepared, engine, prepared.data.probe_rows, probe["rows"])
    if not abs(loss - probe["loss"]) <= PROBE_TOLERANCE * abs(probe["loss"]):
        raise ResumeError(
            f"{found.path} was loaded, but the model computes a loss of {loss:.6f} where {probe['loss']:.6f} was saved with "
            "it. Were the base model or the held-out data changed? Start anew with --resume never."
        )
    set_aside(folder, state.step, report)
    then, now = found.manifest["layout"], engine_layout(prepared)
    moved = "" if then == now else f"; saved on {layout_in_words(then)}, laid out anew for {layout_in_words(now)}"
    report(f"RESUMING from {found.path}: step {state.step}, {state.rows_consumed} rows consumed{moved}")
    if comm.rank() == 0:
        folder.event("resumed", path=str(found.path), step=state.step)
    return state


def set_aside(folder: RunFolder, step: int, report: Report) -> None:
    """Rename the checkpoints beyond the step the run goes on from: they are damaged, or of a run that is not continued."""
    if comm.rank() == 0:
        for old, new in manager.set_aside(folder.checkpoints, step):
            report(f"checkpoint {old} does not belong to what is trained from here on: renamed to {new}")
            folder.event("set_aside", path=old, to=new)


def run_identity(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint and the run that continues it must have in common."""
    settings = prepared.resolved.settings
    return {
        "precision": settings.train.precision,
        "optimizer": written_optimizer(prepared.resolved),
        "model": digest({**prepared.model_config.to_dict(), "_name_or_path": "", "transformers_version": ""}),
        "adapter": settings.adapter.model_dump(mode="json") if settings.adapter else None,
        "global_batch_size": prepared.plan.global_batch_size,
        "seed": settings.train.seed,
        **optimization(prepared),
        "data": prepared.data.fingerprint,
        "rows": prepared.data.rows.num_rows if prepared.data.rows else None,
        "seq_len": settings.data.seq_len,
    }


def engine_layout(prepared: Prepared) -> dict[str, Any]:
    """How the engine lays the state out; a run may be continued with another."""
    return {
        "ranks": prepared.launch.world_size,
        "zero_stage": zero_stage(prepared.resolved),
        "optimizer_on": offload_device(prepared.resolved, "offload_optimizer"),
    }


def layout_in_words(layout: dict[str, Any]) -> str:
    """Such as "2 ranks, ZeRO-3, optimizer on cpu"."""
    where = "" if layout["optimizer_on"] == "none" else f", optimizer on {layout['optimizer_on']}"
    return f"{layout['ranks']} {'rank' if layout['ranks'] == 1 else 'ranks'}, ZeRO-{layout['zero_stage']}{where}"


def optimization(prepared: Prepared) -> dict[str, Any]:
    """What decides the update besides the gradient: DeepSpeed restores it from the checkpoint, whatever the settings say."""
    train_settings = prepared.resolved.settings.train
    names = ("learning_rate", "schedule", "warmup_steps", "min_learning_rate", "weight_decay", "betas", "eps")
    found = {name: getattr(train_settings, name) for name in names}
    if train_settings.schedule != "constant":
        found["max_steps"] = prepared.plan.max_steps  # the falling schedules end there
    return found


def digest(fields: Any) -> str:
    """A short fingerprint of JSON-like fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]
