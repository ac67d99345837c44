"""How a run is saved and how it goes on: what a checkpoint holds besides slices, and what it must have in common with a run."""

from __future__ import annotations

import math
import time
from typing import Any

from ds_trainer import comm, faults, whereabouts
from ds_trainer.agreement import digest
from ds_trainer.arguments.engine_config import offload_device, written_optimizer, zero_stage
from ds_trainer.arguments.objective import numbers_of
from ds_trainer.arguments.schema import AdapterSection, RunSettings
from ds_trainer.assemble import Prepared, evaluate_rows
from ds_trainer.checkpoint import manager
from ds_trainer.checkpoint.keep import Keep
from ds_trainer.checkpoint.saver import Saver
from ds_trainer.data.loader import Windows
from ds_trainer.data.sources import Report
from ds_trainer.engine.wrapper import Engine
from ds_trainer.errors import CheckpointError, NonFiniteError, ResumeError
from ds_trainer.monitor.recorder import Recorder
from ds_trainer.monitor.run_folder import RunFolder
from ds_trainer.protocols import ModelBatch
from ds_trainer.state import TrainState

PROBE_ROWS = (4, 16)
"""Fewest and most rows whose loss is kept in every checkpoint, so that a resume and an export can prove that they compute the
same. Between them, as many as the ranks take in one forward: training stands still for it."""
_WHY_PART = {
    "max_steps": " (A schedule that falls ends at max_steps, so only with train.schedule=constant may it grow. To train "
    "longer, export the run and start a new one from the export.)",
    "global_batch_size": " (On another number of ranks it stays when train.global_batch_size says so and "
    "train.gradient_accumulation_steps is left out.)",
}
"""Why a setting that differs is part of what a checkpoint continues, where that may surprise."""
PROBE_TOLERANCE = 1e-3
"""How far a resumed engine's loss on them may be from the saved one, relative to it; on the same machine it is equal."""
OTHER_PRECISION_TOLERANCE = 5e-2
"""The same where the engine computes in another precision."""


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
        """Of the newest checkpoint that was begun and did not fail."""
        self._failed: CheckpointError | None = None
        """Why the newest one could not be written."""

    def save(self, state: TrainState, judged: dict[str, Any] | None = None) -> None:
        """Begin to write a checkpoint of the step that is complete; the one before it is complete then.

        Args:
            state: how far the run has come.
            judged: `metric`, `goal` and `value` of this step, when it was evaluated.
        """
        whereabouts.at("saving")
        faults.point("saving")
        prepared, engine = self._prepared, self._engine
        self.finish()
        rows = min(max(engine.data_parallel_size * prepared.batch.micro_batch_size, PROBE_ROWS[0]), PROBE_ROWS[1])
        begun = time.monotonic()
        probe = evaluate_rows(prepared, engine, prepared.data.probe_rows, rows)
        probe_seconds = time.monotonic() - begun
        require_finite(probe.loss, state.step)
        whereabouts.at("saving")
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
                "probe": {"rows": rows, "loss": probe.loss, "num_targets": probe.num_targets, "metrics": probe.metrics},
                "judged": judged,
                "settings": prepared.resolved.settings.model_dump(mode="json"),
            },
        )
        self.last_step = state.step
        if not self._saver.background:
            self._saver.wait()
        self._recorder.stopped_for_save(probe_seconds)

    def finish(self) -> None:
        """As `poll`, but waits for it."""
        self._saver.wait()
        self.poll()

    def end(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: it could not be written, whatever `checkpoint.on_failure` says: nothing is left to go on with.
        """
        self.finish()
        if self._failed is not None:
            raise self._failed

    def poll(self) -> None:
        """Say what became of the checkpoint that was being written, if that is known.

        Raises:
            CheckpointError: it could not be written, and the run shall end then.
        """
        try:
            saved = self._saver.poll()
        except CheckpointError as error:
            if not self._goes_on:
                raise
            self.last_step, self._failed = None, error
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


def resume(
    prepared: Prepared, engine: Engine, folder: RunFolder, report: Report, *, other_precision: bool = False
) -> TrainState:
    """Continue from the checkpoint that the settings name, or start anew. Collective.

    Args:
        prepared: what is decided of the run.
        engine: before its first step.
        folder: the run folder.
        report: takes a line for the user.
        other_precision: `debug` computes in another one than the run, on a machine that lacks it.

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
            if folder.metrics.exists() and settings.checkpoint.resume == "auto":
                report("the earlier start completed no checkpoint: this one begins at step 0")
            folder.event("started_anew")
        return TrainState()
    written, ours = as_now(found.manifest["run"]), run_identity(prepared)
    rest, tolerance = found.manifest["engine"], PROBE_TOLERANCE
    if other_precision:
        for name in ("precision", "fingerprint of the model's config"):  # which names the type of the weights
            ours.pop(name)
        rest, tolerance = {**rest, "loss_scaler": None}, OTHER_PRECISION_TOLERANCE
    if differing := [name for name, value in ours.items() if written.get(name) != value]:
        told = "; ".join(f"it has {name} = {written.get(name)}, this run has {ours[name]}" for name in differing[:4])
        hint = next((_WHY_PART[name] for name in differing if name in _WHY_PART), "")
        raise ResumeError(
            f"{found.path} cannot be continued: {told}. Start with the settings it was saved with, or start anew with "
            f"--resume never.{hint}"
        )
    engine.restore(found.slices().read, rest)
    state = TrainState.from_json(found.manifest["state"])
    probe = found.manifest["probe"]
    found_now = evaluate_rows(prepared, engine, prepared.data.probe_rows, probe["rows"])
    # The loss of a preference is a difference, which a changed base would leave alone: the log-probabilities are not.
    compared = [("loss", found_now.loss, probe["loss"])]
    metrics = probe.get("metrics", {})
    compared += [(name, found_now.metrics[name], metrics[name]) for name in metrics if name.startswith("logps/")]
    for name, value, theirs in compared:
        if not abs(value - theirs) <= tolerance * abs(theirs):
            raise ResumeError(
                f"{found.path} was loaded, but the model computes a {name} of {value:.6f} where {theirs:.6f} was saved with "
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
        "adapter": settings.adapter.model_dump(mode="json") if settings.adapter else None,
        "quantize": settings.model.quantize,
        **objective_identity(settings),
        "global_batch_size": prepared.plan.global_batch_size,
        "seed": settings.train.seed,
        **optimization(prepared),
        "seq_len": settings.data.seq_len,
        "rows": prepared.data.rows.num_rows if prepared.data.rows else None,
        "fingerprint of the data": prepared.data.fingerprint,
        "fingerprint of the model's config": config_digest(prepared.model_config, settings.train.stage == "reward"),
    }


def config_digest(config: Any, value_head: bool = False) -> str:
    """A fingerprint of a model's config, without what a run sets itself: in this object or a copy, as it was loaded."""
    own = {"_name_or_path": "", "transformers_version": "", "use_cache": False}
    return digest({**config.to_dict(), **own, **({"pad_token_id": None} if value_head else {})})


def as_now(written: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run, with the values of settings that there were none of when it was written."""
    adapter = written.get("adapter")
    return {
        "no_weight_decay": [],
        "layer_learning_rate_decay": 1.0,
        "neftune_alpha": None,
        "quantize": None,
        "objective.router_weight": None,
        **written,
        "adapter": AdapterSection.model_validate(adapter).model_dump(mode="json") if adapter else None,
    }


def objective_identity(settings: RunSettings) -> dict[str, Any]:
    """The numbers of the objective, and the stage; not that of a language model, which earlier versions did not write down."""
    # Where the reference is computed does not change what it is.
    numbers = {f"objective.{name}": value for name, value in numbers_of(settings).items() if name != "reference"}
    return numbers if settings.train.stage in ("pretrain", "sft") else {"stage": settings.train.stage, **numbers}


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
    others = ("no_weight_decay", "layer_learning_rate_decay", "neftune_alpha")
    found = {name: getattr(train_settings, name) for name in (*names, *others)}
    if train_settings.schedule != "constant":
        found["max_steps"] = prepared.plan.max_steps  # the falling schedules end there
    return found


def require_finite(probe_loss: float, step: int) -> None:
    """Refuse to keep weights that cannot compute: the earlier checkpoints are what the run can go on from.

    Raises:
        NonFiniteError: the loss of the probe rows, the same on every rank, is not finite.
    """
    if not math.isfinite(probe_loss):
        raise NonFiniteError(
            f"step {step}: no checkpoint is written, for with these weights the loss of the probe rows is "
            f"{probe_loss}, though every gradient was finite. Lower train.learning_rate, and go on from the checkpoint before."
        )
