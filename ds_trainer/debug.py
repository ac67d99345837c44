"""The story of a debug run: the same parts in one process, for a debugger or a quick look. Nothing is saved."""

from __future__ import annotations

import dataclasses
from functools import partial

from rich.console import Console
from rich.text import Text

from ds_trainer import comm, loop
from ds_trainer.arguments.merge import Resolved
from ds_trainer.assemble import Prepared, build, device_windows, prepare
from ds_trainer.data.loader import windows
from ds_trainer.launch.detect import Launch
from ds_trainer.monitor.progress import Progress
from ds_trainer.monitor.recorder import Recorder
from ds_trainer.monitor.run_folder import RunFolder
from ds_trainer.protocols import IGNORED, MicroBatch
from ds_trainer.state import TrainState


def debug(resolved: Resolved, launch: Launch, folder: RunFolder, console: Console, *, steps: int, show_rows: int) -> None:
    """Show the first rows as the model sees them, then run the first steps of the run in this process.

    Args:
        resolved: the settings in force; their global batch is kept, and reached by accumulation.
        launch: a world of one.
        folder: where metrics and logs of the debug run go; not the run folder itself.
        console: the terminal.
        steps: optimizer steps to run.
        show_rows: rows to print.

    Raises:
        DsTrainerError: with a text for the user.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # that of loading weights
    progress = Progress(console)
    say = partial(console.print, markup=False)
    folder.metrics.unlink(missing_ok=True)  # those of the debug run before
    prepared = prepare(resolved, launch, say, keep_global=True)
    for text in shown_rows(prepared, show_rows, console.is_terminal):
        console.print(text)
    with comm.process_group(prepared.device, rank=0, world_size=1, timeout_seconds=600):
        engine = build(prepared, say)
        plan = dataclasses.replace(prepared.plan, max_steps=min(steps, prepared.plan.max_steps))
        state = TrainState()
        recorder = Recorder(
            folder,
            progress,
            every_steps=1,
            max_steps=plan.max_steps,
            device=prepared.device,
            write_events=lambda events: None,
        )
        with progress.bar(0, plan.max_steps):
            loop.train(engine, device_windows(prepared, engine, state), state, plan, recorder, after_step=lambda state: None)
        engine.close()
    say(f"{state.step} steps ran in one process; nothing was saved. Metrics: {folder.metrics}")


def shown_rows(prepared: Prepared, count: int, colours: bool) -> list[Text]:
    """The first rows of the run, decoded, with the trained tokens marked."""
    if count == 0:
        return []
    first = next(
        windows(
            prepared.rows,
            first_position=0,
            total_rows=prepared.plan.total_rows,
            seed=prepared.plan.seed,
            micro_batch_size=prepared.plan.global_batch_size,
            gradient_accumulation_steps=1,
            rank=0,
            data_parallel_size=1,
        )
    )[0]
    marks = "green: trained, dim: not" if colours else "[[trained]], the rest is not"
    shown = [Text(f"the first rows as the model sees them ({marks})", style="bold")]
    return shown + [decoded_row(prepared, first, row, colours) for row in range(min(count, first.input_ids.shape[0]))]


def decoded_row(prepared: Prepared, batch: MicroBatch, row: int, colours: bool) -> Text:
    """One row as text; a token is trained when the position before it has it as its label."""
    length = int(batch.is_token[row].sum())
    ids = batch.input_ids[row, :length].tolist()
    labels = batch.labels[row, :length].tolist()
    starts = batch.position_ids[row, :length].tolist()
    trained = [False, *(label != IGNORED for label in labels[:-1])]
    text = Text(f"row {row}: {length} tokens, {sum(trained)} trained\n", style="bold")
    begin = 0
    for end in range(1, length + 1):
        if end < length and trained[end] == trained[begin] and starts[end] != 0:
            continue
        if starts[begin] == 0:
            text.append("--- document\n", style="bold")
        piece = prepared.tokenizer.decode(ids[begin:end])
        if colours:
            text.append(piece, style="green" if trained[begin] else "dim")
        else:
            text.append(f"[[{piece}]]" if trained[begin] else piece)
        if end == length or starts[end] == 0:
            text.append("\n")
        begin = end
    return text
