"""Progress as people follow it: one line a log step, and on a terminal a bar below. Only rank zero shows any."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from ds_trainer.monitor.metrics import clock, quantity

logger = logging.getLogger("ds_trainer")


class Progress:
    """Owns the bar. `console` None shows nothing: the ranks other than zero. What is said goes to every rank's log."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.live = console is not None and console.is_terminal
        self._bar: Bar | None = None
        self._task: Any = None

    @contextmanager
    def bar(self, step: int, max_steps: int) -> Iterator[None]:
        """Show the bar inside the context, on a terminal."""
        self.max_steps = max_steps
        if self.live and self.console is not None:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=30), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=self.console)
            self._task = self._bar.add_task("", total=max_steps, completed=step)
            self._bar.start()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def move(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def line(self, step: int, fields: dict[str, Any], seconds_left: float, slow: Sequence[str] = ()) -> None:
        """Show the numbers of a log step, and which ranks hold the others up."""
        if self.console is None:
            return
        norm = "" if fields["grad_norm"] is None else f"  grad norm {fields['grad_norm']:.3f}"
        fastest, slowest = (f"{fields[name]:.2f}" for name in ("step_seconds_fastest_rank", "step_seconds"))
        seconds = slowest if fastest == slowest else f"{fastest} to {slowest}"
        skipped = f"  {fields['skipped_steps']} steps skipped" if fields["skipped_steps"] else ""
        waits = fields["data_wait_fraction"]
        waiting = f"  {waits:.0%} waiting for data" if waits >= 0.02 else ""
        padding = f"  {fields['padding_fraction']:.0%} padding" if fields["padding_fraction"] >= 0.02 else ""
        utilized = "" if fields["mfu"] is None else f"  MFU {fields['mfu']:.1%}"
        held_up = f"  SLOW: {'; '.join(slow)}" if slow else ""
        left = f"{clock(seconds_left)} left"
        self.console.print(
            f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}  loss {fields['loss']:.4f}  "
            f"lr {fields['learning_rate']:.2e}{norm}  {quantity(fields['tokens_per_second'])} tok/s{utilized}  "
            f"{seconds} s/step  {fields['peak_memory_gib']:.1f} GiB  {left}{skipped}{padding}{waiting}{held_up}",
            markup=False,
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=left)

    def say(self, text: str) -> None:
        """Print a line above the bar, and log it."""
        logger.info(text)
        if self.console is not None:
            self.console.print(text, markup=False)
