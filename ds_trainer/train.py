"""The story of a run: arguments are checked, data is prepared, the engine is built, the loop trains."""

from __future__ import annotations

import math
import os
import shutil
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from ds_trainer import comm, faults, loop, whereabouts
from ds_trainer.agreement import digest, require_agreement
from ds_trainer.arguments.engine_config import offload_device, zero_stage
from ds_trainer.arguments.merge import Resolved
from ds_trainer.arguments.report import resolved_as_json
from ds_trainer.assemble import (
    Prepared,
    arranged_windows,
    build,
    evaluate_rows,
    optimizer_name,
    parameter_counts,
    prepare,
    samples_fed,
)
from ds_trainer.checkpoint import manager
from ds_trainer.data.loader import Windows
from ds_trainer.data.sources import Report
from ds_trainer.engine.wrapper import Engine
from ds_trainer.errors import EXIT_REFUSED, NonFiniteError, ResumeError
from ds_trainer.launch.detect import Launch
from ds_trainer.monitor.progress import Progress
from ds_trainer.monitor.recorder import Recorder
from ds_trainer.monitor.run_folder import RunFolder, environment
from ds_trainer.monitor.signals import StopRequests
from ds_trainer.monitor.watchdog import Watchdog
from ds_trainer.out_of_memory import explained_memory
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


def train(
    resolved: Resolved,
    launch: Launch,
    folder: RunFolder,
    progress: Progress,
    requests: StopRequests,
    on_hang: Callable[[BaseException], Any],
) -> tuple[TrainState, int]:
    """Run from the first line to the last checkpoint. Collective: every rank of the launch.

    Args:
        resolved: the settings in force.
        launch: this process's place in the job.
        folder: the run folder; it exists.
        progress: where rank zero shows what happens.
        requests: whether this process is asked to end.
        on_hang: called in a thread of its own when this rank stands still; accounts for the error and ends the process.

    Returns:
        How far the run came, and why it ended before its time; 0 when it did not.

    Raises:
        DsTrainerError: with a text for the user.
    """
    prepared = prepare(resolved, launch, progress.say)
    train_settings = resolved.settings.train
    with (
        comm.process_group(
            prepared.device,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout_seconds=train_settings.collective_timeout_seconds,
        ),
        Watchdog(
            folder,
            comm.gather_objects(socket.gethostname()),
            timeout_seconds=train_settings.hang_timeout_seconds,
            start_seconds=train_settings.collective_timeout_seconds,
            end=on_hang,
        ),
        explained_memory(prepared) as counts,
    ):
        whereabouts.at("comparing the ranks")
        require_agreement(prepared)
        whereabouts.at("building the engine")
        engine = build(prepared, progress.say)
        counts.extend(parameter_counts(engine.model))
        whereabouts.at("resuming")
        state = resume(prepared, engine, folder, progress.say)
        if launch.rank == 0:
            write_down(prepared, folder)
        windows = arranged_windows(prepared, engine, state, progress.say)
        recorder = Recorder(
            folder,
            progress,
            every_steps=resolved.settings.monitor.log_every_steps,
            max_steps=prepared.plan.max_steps,
            device=prepared.device,
            write_events=engine.write_events,
            data_waits=lambda: windows.waited_seconds,
        )
        first_step = state.step
        requests.begin(peers=processes_here())
        with progress.bar(state.step, prepared.plan.max_steps):
            stopped = loop.train(
                engine,
                windows,
                state,
                prepared.plan,
                recorder,
                after_step=partial(evaluate_and_save, prepared, engine, folder, recorder, windows),
                stop=requests.asked,
                samples_of=samples_fed(prepared, engine),
            )
        if stopped:
            requests.agreed(stopped)
            recorder.finish()
            if state.step > first_step and not is_due(state.step, resolved.settings.checkpoint.every_steps):
                save_now(prepared, engine, folder, recorder, windows, state)
        whereabouts.at("closing")
        windows.close()
        engine.close()
        faults.point("leaving")
        requests.over()
        comm.largest(0)  # nobody leaves before all are: a launcher ends the others with a signal when the first one has left
    return state, stopped


def processes_here() -> list[int]:
    """The processes of all ranks on this host. Collective."""
    host = socket.gethostname()
    return [process for where, process in comm.gather_objects((host, os.getpid())) if where == host]


def write_down(prepared: Prepared, folder: RunFolder) -> None:
    """Keep in the run folder what was asked and what is in force. Rank zero's business."""
    resolved = prepared.resolved
    shutil.copyfile(resolved.config_path, folder.path / "run.yaml")
    folder.write_json("deepspeed.json", prepared.engine_config.config)
    folder.write_json("resolved.json", resolved_as_json(resolved))
    folder.write_json(
        "environment.json",
        environment({"launcher": prepared.launch.launcher, "world_size": prepared.launch.world_size}),
    )
    folder.event("started", launcher=prepared.launch.launcher, world_size=prepared.launch.world_size)


def resume(prepared: Prepared, engine: Engine, folder: RunFolder, report: Report) -> TrainState:
    """Continue from the checkpoint that the settings name, or start anew. Collective.

    Raises:
        ResumeError: the checkpoint belongs to another kind of run.
    """
    settings = prepared.resolved.settings
    if comm.rank() == 0:
        for name in manager.remove_leftovers(folder.checkpoints):
            report(f"removed {name}, which a killed start left unfinished")
    found = manager.find(folder.checkpoints, settings.checkpoint.resume, report, has_history=folder.metrics.exists())
    if found is None:
        set_aside(folder, 0, report)
        return TrainState()
    written, ours = found.manifest["run"], run_identity(prepared)
    for name, value in ours.items():
        if written.get(name) != value:
            raise ResumeError(
                f"{found.path} cannot be continued: it has {name} = {written.get(name)}, this run has {value}. "
                f"Start with the settings it was saved with, or start anew with --resume never.{_WHY_PART.get(name, '')}"
            )
    if offload_device(prepared.resolved, "offload_optimizer") == "nvme":
        raise ResumeError(
            f"{found.path} cannot be continued: DeepSpeed restores an optimizer on nvme wrongly and says nothing. "
            "Export it and start a new run from the export, or start anew with --resume never."
        )
    engine.load(found.path.parent, found.path.name, excluded_frozen=settings.adapter is not None)
    state = TrainState.from_json(found.manifest["state"])
    probe = found.manifest["probe"]
    loss, _ = evaluate_rows(prepared, engine, prepared.data.probe_rows, probe["rows"])
    if not abs(loss - probe["loss"]) <= PROBE_TOLERANCE * abs(probe["loss"]):
        raise ResumeError(
            f"{found.path} was loaded, but the model computes a loss of {loss:.6f} where {probe['loss']:.6f} was saved with "
            "it. Were the base model or the held-out data changed? Start anew with --resume never."
        )
    set_aside(folder, state.step, report)
    report(f"RESUMING from {found.path}: step {state.step}, {state.rows_consumed} rows consumed")
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
        "ranks": prepared.launch.world_size,
        "zero_stage": zero_stage(prepared.resolved),
        "precision": settings.train.precision,
        "optimizer": optimizer_name(prepared),
        "model": digest({**prepared.model_config.to_dict(), "_name_or_path": "", "transformers_version": ""}),
        "adapter": settings.adapter.model_dump(mode="json") if settings.adapter else None,
        "global_batch_size": prepared.plan.global_batch_size,
        "seed": settings.train.seed,
        **optimization(prepared),
        "data": prepared.data.fingerprint,
        "rows": prepared.data.rows.num_rows if prepared.data.rows else None,
        "seq_len": settings.data.seq_len,
    }


def optimization(prepared: Prepared) -> dict[str, Any]:
    """What decides the update besides the gradient: DeepSpeed restores it from the checkpoint, whatever the settings say."""
    train_settings = prepared.resolved.settings.train
    names = ("learning_rate", "schedule", "warmup_steps", "min_learning_rate", "weight_decay", "betas", "eps")
    found = {name: getattr(train_settings, name) for name in names}
    if train_settings.schedule != "constant":
        found["max_steps"] = prepared.plan.max_steps  # the falling schedules end there
    return found


def evaluate_and_save(
    prepared: Prepared, engine: Engine, folder: RunFolder, recorder: Recorder, windows: Windows[ModelBatch], state: TrainState
) -> None:
    """Evaluate and save when the step is due for it. Collective."""
    settings = prepared.resolved.settings
    is_last = state.step == prepared.plan.max_steps
    if settings.evaluate and prepared.data.held_out and (is_last or is_due(state.step, settings.evaluate.every_steps)):
        loss, num_targets = evaluate_rows(prepared, engine, prepared.data.held_out, settings.evaluate.max_rows)
        recorder.evaluation(step=state.step, loss=loss, num_targets=num_targets)
    if is_last or is_due(state.step, settings.checkpoint.every_steps):
        save_now(prepared, engine, folder, recorder, windows, state)


def save_now(
    prepared: Prepared, engine: Engine, folder: RunFolder, recorder: Recorder, windows: Windows[ModelBatch], state: TrainState
) -> None:
    """Save a checkpoint of the step that is complete. Collective."""
    settings = prepared.resolved.settings
    whereabouts.at("saving")
    faults.point("saving")
    loss, num_targets = evaluate_rows(prepared, engine, prepared.data.probe_rows, PROBE_ROWS)
    require_finite(loss, state.step)
    whereabouts.at("saving")
    frozen = settings.adapter is not None
    lanes = {name: cursor for each in comm.gather_objects(windows.cursors) for name, cursor in each.items()}
    path = manager.save(
        folder.checkpoints,
        state.step,
        lambda where, name: engine.save(where, name, exclude_frozen=frozen),
        {
            "state": {**state.to_json(), "stream": lanes},
            "run": run_identity(prepared),
            "probe": {"rows": PROBE_ROWS, "loss": loss, "num_targets": num_targets},
            "settings": settings.model_dump(mode="json"),
        },
        keep_last=settings.checkpoint.keep_last,
    )
    recorder.saved(step=state.step, path=str(path))


def require_finite(probe_loss: float, step: int) -> None:
    """Refuse to keep weights that cannot compute: the earlier checkpoints are what the run can go on from.

    Raises:
        NonFiniteError: the loss of the probe rows, the same on every rank, is not finite.
    """
    if not math.isfinite(probe_loss):
        raise NonFiniteError(
            f"step {step}: no checkpoint is written, for with these weights the loss of the {PROBE_ROWS} probe rows is "
            f"{probe_loss}, though every gradient was finite. Lower train.learning_rate, and go on from the checkpoint before."
        )


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every_steps is not None and step % every_steps == 0


if __name__ == "__main__":
    print("start it as a module: torchrun --nproc-per-node 2 -m ds_trainer train --config run.yaml", file=sys.stderr)
    raise SystemExit(EXIT_REFUSED)
