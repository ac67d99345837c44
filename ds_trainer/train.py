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
from ds_trainer.agreement import require_agreement
from ds_trainer.arguments.merge import Resolved
from ds_trainer.arguments.objective import goal_of
from ds_trainer.arguments.report import resolved_as_json
from ds_trainer.arguments.schema import EvaluateSection
from ds_trainer.assemble import (
    Prepared,
    arranged_windows,
    build,
    evaluate_rows,
    parameter_counts,
    prepare,
    samples_fed,
    speed_of,
)
from ds_trainer.completions import complete_prompts
from ds_trainer.engine.wrapper import Engine
from ds_trainer.errors import EXIT_REFUSED
from ds_trainer.launch.detect import Launch
from ds_trainer.monitor.progress import Progress
from ds_trainer.monitor.recorder import Recorder
from ds_trainer.monitor.run_folder import RunFolder, environment
from ds_trainer.monitor.signals import StopRequests
from ds_trainer.monitor.watchdog import Watchdog
from ds_trainer.out_of_memory import explained_memory
from ds_trainer.precompute import attach_reference
from ds_trainer.recovery import Saving, resume
from ds_trainer.state import TrainState


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
        attach_reference(prepared, engine, progress.say)
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
            own_seconds=engine.own_seconds,
            speed=speed_of(prepared, engine, progress.say),
            take_metrics=engine.take_metrics,
        )
        saving = Saving(prepared, engine, folder, recorder, windows)
        first_step = state.step
        requests.begin(peers=processes_here())
        with progress.bar(state.step, prepared.plan.max_steps):
            stopped = loop.train(
                engine,
                windows,
                state,
                prepared.plan,
                recorder,
                after_step=partial(evaluate_and_save, prepared, engine, recorder, saving),
                stop=requests.asked,
                samples_of=samples_fed(prepared, engine),
            )
        if launch.rank == 0 and prepared.plan.out_of_patience(state):
            folder.event("out_of_patience", **state.best)
        if stopped:
            requests.agreed(stopped)
            recorder.finish()
            if state.step > first_step and state.step != saving.last_step:
                saving.save(state)
        whereabouts.at("saving")
        saving.end()
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
    folder.event(
        "started", launcher=prepared.launch.launcher, world_size=prepared.launch.world_size, data=prepared.data.fingerprint
    )


def evaluate_and_save(prepared: Prepared, engine: Engine, recorder: Recorder, saving: Saving, state: TrainState) -> None:
    """Evaluate and save when the step is due for it, and take in what was saved meanwhile. Collective."""
    settings = prepared.resolved.settings
    judged = None
    if settings.evaluate and (prepared.plan.is_over(state) or is_due(state.step, settings.evaluate.every_steps)):
        judged = evaluate_sets(prepared, engine, recorder, settings.evaluate, state.step)
        if judged is not None:
            state.judge(**judged, min_improvement=settings.evaluate.min_improvement)
    if prepared.plan.is_over(state) or is_due(state.step, settings.checkpoint.every_steps):
        saving.save(state, judged)
    saving.poll()


def evaluate_sets(
    prepared: Prepared, engine: Engine, recorder: Recorder, evaluate: EvaluateSection, step: int
) -> dict[str, Any] | None:
    """Evaluate all held-out sets. Collective.

    Returns:
        `metric`, `goal` and `value` of what the best checkpoint goes by; None when that is not a finite number.
    """
    found: dict[str, float] = {}
    if evaluate.generate is not None:
        recorder.completions(step=step, found=complete_prompts(prepared, engine, evaluate.generate, step))
    for name, rows in prepared.data.held_out.items():
        result = evaluate_rows(prepared, engine, rows, evaluate.max_rows)
        recorder.evaluation(step=step, result=result, name=name)
        measured = {"loss": result.loss, **result.metrics}
        found |= {f"{name}/{each}" if name else each: value for each, value in measured.items()}
    goal, value = goal_of(prepared.resolved.settings), found.get(evaluate.metric, math.nan)
    return {"metric": evaluate.metric, "goal": goal, "value": value} if goal and math.isfinite(value) else None


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every_steps is not None and step % every_steps == 0


if __name__ == "__main__":
    print("start it as a module: torchrun --nproc-per-node 2 -m ds_trainer train --config run.yaml", file=sys.stderr)
    raise SystemExit(EXIT_REFUSED)
