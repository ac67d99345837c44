"""The story of a debug run: the same parts in one process, for a debugger or a quick look. Nothing is saved.

Without a rank, the rows of all ranks are run by accumulation, so that losses and updates are those of the run. With a rank, its
share of one step is, and no other: its losses are exact, and no update is made, for that needs the rows of all ranks.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ds_trainer import comm, loop
from ds_trainer.arguments.batch import BatchPlan
from ds_trainer.arguments.engine_config import solve_run_batch
from ds_trainer.arguments.merge import Resolved
from ds_trainer.assemble import Prepared, arranged_windows, build, parameter_counts, prepare, speed_of
from ds_trainer.checkpoint.layout import complete_checkpoints, read_manifest
from ds_trainer.debug.asked import Asked, require_rank, require_step
from ds_trainer.debug.culprit import Looks
from ds_trainer.debug.ranks import AsRanks, accumulated, place_of
from ds_trainer.debug.replay import Crash, require_same_data
from ds_trainer.debug.rows import shown_rows
from ds_trainer.errors import ResumeError
from ds_trainer.launch.detect import Launch
from ds_trainer.monitor.progress import Progress
from ds_trainer.monitor.recorder import Recorder
from ds_trainer.monitor.run_folder import RunFolder
from ds_trainer.nonfinite import SHOWN
from ds_trainer.out_of_memory import explained_memory
from ds_trainer.precompute import attach_reference
from ds_trainer.protocols import MicroBatch, ModelBatch
from ds_trainer.recovery import resume
from ds_trainer.run_data import read_windows, samples_of_rows
from ds_trainer.state import TrainState

STEPS = 3
"""Optimizer steps that are run when nobody says how many."""
TRACKERS = ("tensorboard", "wandb", "csv_monitor", "comet")


def debug(
    resolved: Resolved,
    launch: Launch,
    folder: RunFolder,
    console: Console,
    asked: Asked,
    *,
    crash: Crash | None = None,
    other_precision: bool = False,
) -> None:
    """Show rows as the model sees them, then run steps of the run in this process.

    Args:
        resolved: the settings in force; `checkpoint.resume` is `asked.checkpoint`, or never.
        launch: a world of one.
        folder: where metrics and logs of the debug run go; not the run folder itself.
        console: the terminal.
        asked: what is run and what is looked for.
        crash: the failed start that is replayed up to the step it failed at.
        other_precision: this machine does not compute in the precision of the run.

    Raises:
        DsTrainerError: with a text for the user.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # that of loading weights
    progress = Progress(console)
    say = partial(console.print, markup=False)
    folder.metrics.unlink(missing_ok=True)  # those of the debug run before
    manifest = manifest_of(asked.checkpoint) if asked.checkpoint else None
    weights = TrainState.from_json(manifest["state"]) if manifest else TrainState()
    many = batch_of(resolved, asked.world_size or (manifest["layout"]["ranks"] if manifest else None))
    require_rank(asked.rank, many.data_parallel_size)
    prepared = prepare(resolved, launch, say, batch=accumulated(many))
    for name in TRACKERS:
        prepared.engine_config.config.pop(name, None)  # a tracker is for the run
    if crash:
        require_same_data(crash, prepared.data.fingerprint)
    first = asked.step or weights.step + 1
    require_step(first, prepared.plan.max_steps)
    if crash and first > crash.step:
        raise ResumeError(f"--from {asked.checkpoint}: is of step {weights.step}, and step {crash.step} is to be replayed.")
    if prepared.data.stream and first <= weights.step:
        raise ResumeError(f"--step {first}: a stream is only read forward, and {asked.checkpoint} is at step {weights.step}.")
    last = crash.step if crash else min(first - 1 + (asked.steps or STEPS), prepared.plan.max_steps)
    target = crash.step if crash else first
    for line in what_is_run(asked, crash, weights.step, first, many):
        say(line)
    for text in rows_of_step(prepared, weights, target, many, asked, crash, console.is_terminal):
        console.print(text)
    with (
        comm.process_group(prepared.device, rank=0, world_size=1, timeout_seconds=600),
        explained_memory(prepared) as counts,
    ):
        engine = build(prepared, say)
        counts.extend(parameter_counts(engine.model))
        attach_reference(prepared, engine, say)
        if asked.checkpoint:
            weights = resume(prepared, engine, folder, say, other_precision=other_precision)
        windows = arranged_windows(prepared, engine, reading_from(prepared, weights, first), say)
        for _ in range(steps_to_skip(prepared, weights, first)):
            next(windows)
        state = state_before(prepared, weights, first)
        ranks = AsRanks(
            engine,
            state,
            many,
            seed=prepared.plan.seed,
            streamed=prepared.data.stream is not None,
            samples_of=partial(samples_of_step, prepared),
            report=say,
            looks=Looks(
                outputs=asked.nan_hooks,
                # In fp16, gradients that overflow are how the loss scale is found.
                gradients=asked.nan_hooks and prepared.resolved.settings.train.precision != "fp16",
                anomaly=asked.anomaly,
                from_step=target,
            ),
        )
        end = target - 1 if asked.rank is not None else last
        plan = dataclasses.replace(prepared.plan, max_steps=end)
        recorder = Recorder(
            folder,
            progress,
            every_steps=1,
            max_steps=end,
            device=prepared.device,
            write_events=lambda events: None,
            data_waits=lambda: windows.waited_seconds,
            own_seconds=engine.own_seconds,
            speed=speed_of(prepared, engine, say),
            take_metrics=engine.take_metrics,
        )
        with progress.bar(state.step, end):
            loop.train(
                ranks,
                windows,
                state,
                plan,
                recorder,
                lambda state: None,
                samples_of=lambda begin, index: [each for row in samples_of_step(prepared, begin, index) for each in row],
            )
        if asked.rank is not None:
            run_share(ranks, next(windows), asked.rank, folder, say)
        windows.close()
        engine.close()
    if crash:
        what = f"step {crash.step}" if asked.rank is None else f"rank {asked.rank}'s share of step {crash.step}"
        say(
            f"{what} ran here without a failure. In the run it ended with: {crash.reason}\n"
            "Data, weights and settings alone do not make it fail: look at the hosts, the memory and the network of that run."
        )
    done = f"{end - first + 1} steps ran in one process" if asked.rank is None else "one rank's share ran, without an update"
    say(f"{done}; nothing was saved. Metrics: {folder.metrics}")


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        ResumeError: it is none.
    """
    there = [str(path) for path in complete_checkpoints(checkpoint.parent)]
    others = (
        f"There is {', '.join(there)}." if there else "Name the folder of one, such as out/my-run/checkpoints/step_00000100."
    )
    if not checkpoint.is_dir():
        raise ResumeError(f"--from {checkpoint}: there is no such folder. {others}")
    try:
        return read_manifest(checkpoint)
    except ValueError as error:
        raise ResumeError(f"--from {checkpoint}: is no complete checkpoint: {error}. {others}") from None


def batch_of(resolved: Resolved, world_size: int | None) -> BatchPlan:
    """How the rows of a step are spread over the ranks; where nobody says how many there are, over this process."""
    if world_size is None:
        return solve_run_batch(resolved, 1, keep_global=True)
    return solve_run_batch(resolved, world_size)


def what_is_run(asked: Asked, crash: Crash | None, weights_step: int, first: int, many: BatchPlan) -> list[str]:
    """What is exact of this debug run and what is not, in words.

    Args:
        asked: what is run.
        crash: what is replayed.
        weights_step: steps the weights have made.
        first: the first step that is run, from 1.
        many: the batch of the run's ranks.
    """
    where = "the INITIAL ones" if asked.checkpoint is None else f"those after step {weights_step} ({asked.checkpoint})"
    lines = [f"weights and optimizer: {where}"]
    if first != weights_step + 1:
        lines[0] += (
            f"; only data and dropout are those of step {first}. For its weights: --from a checkpoint of step {first - 1}"
        )
    if many.data_parallel_size > 1:
        lines.append(f"as {many.data_parallel_size} ranks: {many}, each micro-batch with its rank's dropout")
    if asked.rank is not None:
        lines.append(f"only the share of rank {asked.rank}: its losses are exact; an update would need the rows of all ranks")
    if crash:
        before = f"after steps {first} to {crash.step - 1}" if crash.step > first + 1 else f"after step {crash.step - 1}"
        who = ", ".join(f"rank {rank}" for rank in crash.micro_batches)
        lines.insert(0, f"replaying step {crash.step} of {crash.run}, {before}. It ended with: {crash.reason}")
        lines.insert(1, f"settings: those that {crash.run / 'resolved.json'} kept, whatever the files they came from say now")
        lines += [f"in the run, the loss was not finite on {who}"] if who else []
    return lines


def state_before(prepared: Prepared, weights: TrainState, step: int) -> TrainState:
    """The state in which a step is run: that of the weights, or the position that the order of the data has before the step."""
    if step == weights.step + 1:
        return weights
    rows = (step - 1) * prepared.plan.global_batch_size
    return TrainState(step=step - 1, rows_consumed=min(rows, prepared.plan.total_rows or rows), stream=weights.stream)


def reading_from(prepared: Prepared, weights: TrainState, step: int) -> TrainState:
    """The state from which windows are read: a stream is read from where it was, rows from anywhere."""
    return weights if prepared.data.stream else state_before(prepared, weights, step)


def steps_to_skip(prepared: Prepared, weights: TrainState, step: int) -> int:
    """Windows of a stream that are passed over."""
    return step - 1 - weights.step if prepared.data.stream else 0


def samples_of_step(prepared: Prepared, rows_consumed: int, index: int) -> list[list[str]]:
    """The samples of each row of a micro-batch, from 0 among all of a step."""
    return samples_of_rows(rows_consumed, index, prepared.data, prepared.batch, prepared.plan, rank=0, data_parallel_size=1)


def rows_of_step(
    prepared: Prepared, weights: TrainState, step: int, many: BatchPlan, asked: Asked, crash: Crash | None, colours: bool
) -> list[Any]:
    """The rows of a step that are shown: of the rank that was asked for, or those that a crash was about, or the first."""
    if not asked.show_rows:
        return []
    windows = read_windows(
        prepared.resolved,
        prepared.data,
        prepared.batch,
        prepared.plan,
        reading_from(prepared, weights, step),
        lambda batch: batch,
        rank=0,
        data_parallel_size=1,
        report=lambda line: None,
    )
    for _ in range(steps_to_skip(prepared, weights, step)):
        next(windows)
    window: list[MicroBatch] = next(windows)
    windows.close()
    begin = state_before(prepared, weights, step).rows_consumed
    blamed = crash.micro_batches if crash else {}
    chosen = []
    for index, batch in enumerate(window):
        rank, micro_batch = place_of(index, many, prepared.data.stream is not None)
        wanted = rank == asked.rank if asked.rank is not None else not blamed or micro_batch in blamed.get(rank, [])
        if wanted:
            whose = f"rank {rank}, micro-batch {micro_batch + 1}" if many.data_parallel_size > 1 else ""
            chosen.append((whose, batch, samples_of_step(prepared, begin, index)))
    return list(shown_rows(prepared.data.tokenizer, chosen, asked.show_rows, step, colours))


def run_share(ranks: AsRanks, window: list[ModelBatch], rank: int, folder: RunFolder, say: Any) -> None:
    """Run the micro-batches of one rank, and show what each of them is and gives.

    The losses are the rank's shares of the loss of the step: what they are means over is counted over all ranks.
    """
    ranks.train_mode(True)
    step = ranks.state.step + 1
    num_targets = max(1, sum(batch.num_targets for batch in window))
    units = [max(1, sum(each)) for each in zip(*map(ranks.units, window), strict=True)]
    for index, batch in enumerate(window):
        whose, micro_batch = place_of(index, ranks.batch, ranks.streamed)
        if whose != rank:
            continue
        share = float(ranks.run(index, batch.to(ranks.device), torch.tensor(units, device=ranks.device)))
        samples = [sample for row in ranks.samples_of(ranks.state.rows_consumed, index) for sample in row]
        # A loss of several terms is a mean over several things, and has no mean of a micro-batch's own.
        loss = share * units[0] / max(1, ranks.units(batch)[0]) if len(units) == 1 else share
        fields = {"step": step, "rank": rank, "micro_batch": micro_batch + 1, "loss": loss, "share": share}
        folder.metric(
            {
                **fields,
                "tokens": batch.num_tokens,
                "targets": batch.num_targets,
                "step_targets": num_targets,
                "samples": samples,
            }
        )
        listed = f"; {', '.join(samples[:SHOWN])}{' ...' if len(samples) > SHOWN else ''}" if samples else ""
        say(
            f"step {step}, rank {rank}, micro-batch {micro_batch + 1}/{ranks.batch.gradient_accumulation_steps}: "
            f"{batch.num_tokens} tokens, {batch.num_targets} of the step's {num_targets} targets, loss {loss:.4f} "
            f"({share:.4f} of the step's loss){listed}"
        )
