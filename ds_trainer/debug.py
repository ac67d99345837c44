"""The story of a debug run: the same parts in one process, for a debugger or a quick look. Nothing is saved."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.text import Text

from ds_trainer import comm, loop
from ds_trainer.arguments.merge import Resolved
from ds_trainer.assemble import Prepared, arranged_windows, build, parameter_counts, prepare, samples_fed
from ds_trainer.launch.detect import Launch
from ds_trainer.monitor.progress import Progress
from ds_trainer.monitor.recorder import Recorder
from ds_trainer.monitor.run_folder import RunFolder
from ds_trainer.out_of_memory import explained_memory
from ds_trainer.prepare import marked
from ds_trainer.protocols import IGNORED, MicroBatch
from ds_trainer.run_data import read_windows
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
    with (
        comm.process_group(prepared.device, rank=0, world_size=1, timeout_seconds=600),
        explained_memory(prepared) as counts,
    ):
        engine = build(prepared, say)
        counts.extend(parameter_counts(engine.model))
        plan = dataclasses.replace(prepared.plan, max_steps=min(steps, prepared.plan.max_steps))
        state = TrainState()
        windows = arranged_windows(prepared, engine, state, say)
        recorder = Recorder(
            folder,
            progress,
            every_steps=1,
            max_steps=plan.max_steps,
            device=prepared.device,
            write_events=lambda events: None,
            data_waits=lambda: windows.waited_seconds,
        )
        with progress.bar(0, plan.max_steps):
            loop.train(engine, windows, state, plan, recorder, lambda state: None, samples_of=samples_fed(prepared, engine))
        windows.close()
        engine.close()
    say(f"{state.step} steps ran in one process; nothing was saved. Metrics: {folder.metrics}")


def shown_rows(prepared: Prepared, count: int, colours: bool) -> list[Text]:
    """The first rows of the run, decoded, with the trained tokens marked."""
    if count == 0:
        return []
    windows = read_windows(
        prepared.resolved,
        prepared.data,
        prepared.batch,
        prepared.plan,
        TrainState(),
        lambda batch: batch,
        rank=0,
        data_parallel_size=1,
        report=lambda line: None,
    )
    window = next(windows)
    windows.close()
    rows = [(batch, row) for batch in window for row in range(batch.input_ids.shape[0])]
    marks = "green: trained, dim: not" if colours else "[[trained]], the rest is not"
    shown = [Text(f"the first rows as the model sees them ({marks})", style="bold")]
    for number, (batch, row) in enumerate(rows[:count]):
        shown.append(Text(f"row {number}: ", style="bold").append(decoded_row(prepared.data.tokenizer, batch, row, colours)))
    return shown


def decoded_row(tokenizer: Any, batch: MicroBatch, row: int, colours: bool) -> Text:
    """One row as text; a token is trained when the position before it has it as its label."""
    length = int(batch.is_token[row].sum())
    ids = batch.input_ids[row, :length].tolist()
    labels = batch.labels[row, :length].tolist()
    starts = batch.position_ids[row, :length].tolist()
    trained = [False, *(label != IGNORED for label in labels[:-1])]
    text = Text(f"{length} tokens, {sum(trained)} trained\n", style="bold")
    documents = [at for at in range(length) if starts[at] == 0]
    for begin, end in pairwise([*documents, length]):
        text.append("--- document\n", style="bold")
        text.append(marked(tokenizer, ids[begin:end], trained[begin:end], colours)).append("\n")
    return text
