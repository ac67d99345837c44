"""What is measured of a run: sums on the device at every step, numbers and lines on the log steps only."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_trainer import comm
from ds_trainer.monitor.metrics import in_words, perplexity, remaining_seconds
from ds_trainer.monitor.progress import Progress
from ds_trainer.monitor.ranks import RankPace, by_rank, find_stragglers
from ds_trainer.monitor.run_folder import RunFolder, Stopwatch, peak_memory_gib
from ds_trainer.protocols import MetricSums

FEWEST_STEPS = 8
"""Steps over which a rank must be slow before it is called a straggler."""
Events = list[tuple[str, float, int]]


class Evaluated(Protocol):
    """What an evaluation gave; `loop.Evaluation` is one."""

    @property
    def loss(self) -> float: ...  # noqa: D102
    @property
    def num_targets(self) -> int: ...  # noqa: D102
    @property
    def metrics(self) -> Mapping[str, float]: ...  # noqa: D102


class Recorder:
    """Collects the steps since the last log line, and writes that line when it is due. Collective on log steps."""

    def __init__(
        self,
        folder: RunFolder,
        progress: Progress,
        *,
        every_steps: int,
        max_steps: int,
        device: torch.device,
        write_events: Callable[[Events], None],
        data_waits: Callable[[], float],
        own_seconds: Callable[[], list[float]],
        take_metrics: Callable[[], MetricSums] = dict,
    ) -> None:
        self.folder = folder
        self.progress = progress
        self.every_steps = every_steps
        self.max_steps = max_steps
        self.device = device
        self.write_events = write_events
        self.data_waits = data_waits
        self.own_seconds = own_seconds
        self.take_metrics = take_metrics
        self._waited = 0.0
        # Of more steps than one, also where every step is logged: one slow step makes no straggler.
        self._waits: deque[float] = deque(maxlen=max(every_steps, FEWEST_STEPS))
        self._forwards: deque[float] = deque(maxlen=max(every_steps, FEWEST_STEPS))
        self._named: set[tuple[int, str]] = set()
        self._stall = 0.0
        self.last_loss: float | None = None
        self.skipped = 0
        self._last: tuple[int, Any] = 0, None
        self._watch = Stopwatch()
        self._reset()

    def _reset(self) -> None:
        self._losses: list[Tensor] = []
        self._tokens = torch.zeros(2, dtype=torch.float64, device=self.device)

    def step(self, *, step: int, loss: Tensor, num_tokens: int, num_targets: Tensor, outcome: Any) -> None:
        """Take one optimizer step in. Collective when the step is a log step.

        Args:
            step: optimizer steps that are complete now.
            loss: this rank's share of the loss of the step, on the device.
            num_tokens: tokens this rank fed.
            num_targets: targets over all ranks, on the device.
            outcome: what the engine's `end_step` returned.
        """
        waited = self.data_waits()
        self._waits.append(waited - self._waited)
        self._waited = waited
        self._losses.append(loss)
        self._tokens[0] += num_tokens
        self._tokens[1] += num_targets / comm.world_size()
        self.skipped += not outcome.applied
        self._last = step, outcome
        due = step % self.every_steps == 0 or step == self.max_steps or step == 1
        if due:
            self._log(step, outcome)
        elif self.progress.live:
            self.progress.move(step)

    def finish(self) -> None:
        """Write the line of the last step, where it is not a log step. Collective."""
        if self._losses:
            self._log(*self._last)

    def _log(self, step: int, outcome: Any) -> None:
        shares = torch.stack(self._losses).to(torch.float64)
        measured = self.take_metrics()
        own_sums = [torch.stack([value.double(), torch.full_like(value, of).double()]) for value, of in measured.values()]
        sums = comm.sum_over_ranks(torch.cat([shares, self._tokens, *own_sums])).tolist()
        losses, (tokens, targets), found = sums[: len(shares)], sums[len(shares) :][:2], sums[len(shares) + 2 :]
        metrics = {name: value / max(1.0, of) for name, value, of in zip(measured, found[::2], found[1::2], strict=True)}
        # After the collective, so that it holds the wait for the device and for slower ranks too.
        seconds = self._watch.lap()
        self._forwards.extend(self.own_seconds())
        steps = len(losses)
        own = RankPace(
            host=socket.gethostname(),
            step_seconds=seconds / steps,
            data_wait_seconds=sum(list(self._waits)[-steps:]) / steps,
            usual_data_wait_seconds=median(self._waits),
            usual_forward_seconds=median(self._forwards) if self._forwards else 0.0,
            peak_memory_gib=peak_memory_gib(self.device.type),
        )
        ranks = comm.gather_objects(own, comm.HOST)
        per_step = [each.step_seconds for each in ranks]
        stragglers = find_stragglers(ranks) if comm.rank() == 0 and len(self._waits) >= FEWEST_STEPS else []
        self.last_loss = losses[-1]
        grad_norm = outcome.grad_norm
        fields: dict[str, Any] = {
            "step": step,
            "loss": losses[-1],
            "loss_mean": sum(losses) / len(losses),
            **metrics,
            "learning_rate": outcome.learning_rate,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "tokens_per_second": tokens / seconds,
            "targets_per_second": targets / seconds,
            "step_seconds": max(per_step),
            "step_seconds_fastest_rank": min(per_step),
            "data_wait_fraction": max(each.data_wait_seconds / each.step_seconds for each in ranks),
            "peak_memory_gib": max(each.peak_memory_gib for each in ranks),
            "loss_scale": outcome.loss_scale,
            "skipped_steps": self.skipped,
            "by_rank": by_rank(ranks),
            "stragglers": [each.as_fields() for each in stragglers],
        }
        if comm.rank() == 0:
            self.folder.metric(fields)
            for each in stragglers:
                if (each.rank, each.what) not in self._named:
                    self.folder.event("straggler", step=step, **each.as_fields())
            self._named = {(each.rank, each.what) for each in stragglers}
            left = remaining_seconds(self.max_steps - step, max(per_step))
            self.progress.line(step, fields, left, slow=[str(each) for each in stragglers])
            names = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
            self.write_events(
                [(f"train/{name}", fields[name], step) for name in (*names, *metrics) if fields[name] is not None]
            )
        self._reset()

    def skipped_step(self, text: str, fields: dict[str, Any]) -> None:
        """Take in why a step left the weights alone; the same on every rank."""
        if comm.rank() == 0:
            self.folder.event("skipped", **fields)
            self.progress.say(f"SKIPPED {text}")

    def evaluation(self, *, step: int, result: Evaluated) -> None:
        """Take the result of an evaluation in; the same numbers on every rank."""
        if comm.rank() == 0:
            loss, num_targets, metrics = result.loss, result.num_targets, result.metrics
            fields = {
                "step": step,
                "evaluate_loss": loss,
                **({f"evaluate_{name}": value for name, value in metrics.items()} or {"evaluate_perplexity": perplexity(loss)}),
                "evaluate_targets": num_targets,
            }
            self.folder.metric(fields)
            told = in_words(metrics) or f"perplexity {perplexity(loss):.2f}"
            self.progress.say(f"step {step}: held-out loss {loss:.4f}, {told} ({num_targets} targets)")
            self.write_events(
                [("evaluate/loss", loss, step), *((f"evaluate/{name}", value, step) for name, value in metrics.items())]
            )
        self._watch.lap()

    def stopped_for_save(self) -> None:
        """Take in how long training stood still for the checkpoint that is being written."""
        self._stall = self._watch.lap()

    def saved(self, *, step: int, path: str, num_bytes: int, seconds: float, untidy: str | None) -> None:
        """Take a complete checkpoint in."""
        if comm.rank() == 0:
            fields = {"bytes": num_bytes, "seconds": round(seconds, 3), "stall_seconds": round(self._stall, 3)}
            self.folder.event("saved", step=step, path=path, **fields)
            self.progress.say(f"step {step}: saved {path}")
            if untidy is not None:
                self.progress.say(f"what is older than {path} could not be tidied up: {untidy}")

    def not_saved(self, reason: str) -> None:
        """Take in that a checkpoint could not be written, and that training goes on without it."""
        if comm.rank() == 0:
            self.folder.event("not_saved", reason=reason)
            self.progress.say(f"NOT SAVED, training goes on (checkpoint.on_failure = continue): {reason}")
