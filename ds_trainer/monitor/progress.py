"""Progress as people follow it: a bar on a terminal, one line a log step elsewhere. Only rank zero shows any."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from ds_trainer.monitor.metrics import clock, quantity


class Progress:
    """Owns the bar. `console` None shows nothing: the ranks other than zero."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.live = console is not None and console.is_terminal
        self._bar: Bar | None = None
        self._task: Any = None

    def start(self, step: int, max_steps: int) -> None:
        """Show the bar, on a terminal."""
        self.max_steps = max_steps
        if self.live and self.console is not None:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=self.console)
            self._task = self._bar.add_task("", total=max_steps, completed=step)
            self._bar.start()

    def move(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def line(self, step: int, fields: dict[str, Any], seconds_left: float) -> None:
        """Show the numbers of a log step."""
        norm = "" if fields["grad_norm"] is None else f"  grad norm {fields['grad_norm']:.3f}"
        spread = fields["step_seconds"] - fields["step_seconds_fastest_rank"]
        skipped = f"  {fields['skipped_steps']} steps skipped" if fields["skipped_steps"] else ""
        text = (
            f"loss {fields['loss']:.4f}  lr {fields['learning_rate']:.2e}{norm}  "
            f"{quantity(fields['tokens_per_second'])} tok/s  {fields['step_seconds']:.2f} s/step "
            f"(ranks within {spread:.2f})  {fields['peak_memory_gib']:.1f} GiB{skipped}  {clock(seconds_left)} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self.console is not None:
            self.console.print(f"step {step}/{self.max_steps}  {text}", markup=False)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.console is not None:
            self.console.print(text, markup=False)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
