"""What is measured of a run: sums on the device at every step, numbers and lines on the log steps only."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_trainer import comm
from ds_trainer.monitor.metrics import ModelFlops, in_words, perplexity, remaining_seconds
from ds_trainer.monitor.progress import Progress
from ds_trainer.monitor.ranks import RankPace, by_rank, find_stragglers
from ds_trainer.monitor.run_folder import RunFolder, Stopwatch, peak_memory_gib
from ds_trainer.protocols import MetricSums, ModelBatch


@dataclass(frozen=True, slots=True)
class Speed:
    """What is needed to say how much of the devices a run uses."""

    flops: ModelFlops | None = None
    """None where the model's operations cannot be counted."""
    peak_flops: float | None = None
    """Operations a second of one device at most; None where that is not known."""

    def fields(self, tokens: float, pairs: float, seconds: float, ranks: int) -> dict[str, float | None]:
        """Operations a second on each rank, and their share of the peak: model FLOPs utilization (PaLM, appendix B)."""
        achieved = None if self.flops is None else self.flops.of(tokens, pairs) / seconds / ranks
        utilized = None if achieved is None or self.peak_flops is None else achieved / self.peak_flops
        return {"tflops_per_rank": None if achieved is None else achieved / 1e12, "mfu": utilized}


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
        speed: Speed,
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
        self.speed = speed
        self.take_metrics = take_metrics
        self._waited = 0.0
        # Of more steps than one, also where every step is logged: one slow step makes no straggler.
        self._waits: deque[float] = deque(maxlen=max(every_steps, FEWEST_STEPS))
        self._forwards: deque[float] = deque(maxlen=max(every_steps, FEWEST_STEPS))
        self._named: set[tuple[int, str]] = set()
        self._stall: dict[str, float] = {}
        self.last_loss: float | None = None
        self.skipped = 0
        self._last: tuple[int, Any] = 0, None
        self._watch = Stopwatch()
        self._reset()

    def _reset(self) -> None:
        self._losses: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._tokens = self._positions = self._pairs = 0

    def step(self, *, step: int, loss: Tensor, window: list[ModelBatch], num_targets: Tensor, outcome: Any) -> None:
        """Take one optimizer step in. Collective when the step is a log step.

        Args:
            step: optimizer steps that are complete now.
            loss: this rank's share of the loss of the step, on the device.
            window: the micro-batches this rank fed.
            num_targets: targets over all ranks, on the device.
            outcome: what the engine's `end_step` returned.
        """
        waited = self.data_waits()
        self._waits.append(waited - self._waited)
        self._waited = waited
        self._losses.append(loss)
        self._targets.append(num_targets)
        self._tokens += sum(batch.num_tokens for batch in window)
        self._positions += sum(batch.num_positions for batch in window)
        self._pairs += sum(batch.attention_pairs for batch in window)
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
        fed = torch.tensor([self._tokens, self._positions, self._pairs], dtype=torch.float64, device=self.device)
        targets_here = torch.stack(self._targets).sum().to(torch.float64) / comm.world_size()  # each is of all ranks already
        measured = self.take_metrics()
        own_sums = [torch.stack([value.double(), torch.full_like(value, of).double()]) for value, of in measured.values()]
        sums = comm.sum_over_ranks(torch.cat([shares, fed, targets_here[None], *own_sums])).tolist()
        losses, rest = sums[: len(shares)], sums[len(shares) :]
        (tokens, positions, pairs, targets), found = rest[:4], rest[4:]
        metrics = {name: value / of for name, value, of in zip(measured, found[::2], found[1::2], strict=True) if of}
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
            "padding_fraction": 1 - tokens / positions,
            **self.speed.fields(tokens, pairs, seconds, comm.world_size()),
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
            names = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", *metrics)
            self.write_events([(f"train/{name}", fields[name], step) for name in names if fields[name] is not None])
        self._reset()

    def skipped_step(self, text: str, fields: dict[str, Any]) -> None:
        """Take in why a step left the weights alone; the same on every rank."""
        if comm.rank() == 0:
            self.folder.event("skipped", **fields)
            self.progress.say(f"SKIPPED {text}")

    def evaluation(self, *, step: int, result: Evaluated, name: str = "") -> None:
        """Take the result of an evaluation of one held-out set in; the same numbers on every rank."""
        if comm.rank() == 0:
            loss, num_targets, metrics = result.loss, result.num_targets, result.metrics
            fields = {
                "step": step,
                **({"set": name} if name else {}),
                "evaluate_loss": loss,
                **({f"evaluate_{name}": value for name, value in metrics.items()} or {"evaluate_perplexity": perplexity(loss)}),
                "evaluate_targets": num_targets,
            }
            self.folder.metric(fields)
            told = in_words(metrics) if metrics else f"perplexity {perplexity(loss):.2f}"
            which = f" of {name}" if name else ""
            self.progress.say(f"step {step}: held-out loss{which} {loss:.4f}, {told} ({num_targets} targets)")
            prefix = f"evaluate/{name}/" if name else "evaluate/"
            self.write_events([(f"{prefix}{each}", value, step) for each, value in {"loss": loss, **metrics}.items()])
        self._watch.lap()

    def completions(self, *, step: int, found: Sequence[Mapping[str, Any]]) -> None:
        """Take completions in: all of each in events.jsonl, the beginning on the terminal."""
        if comm.rank() == 0:
            lines = [f"step {step}: the model completes"]
            for each in found:
                self.folder.event("generated", step=step, **each)
                ended = "" if each["ended"] else " ..."
                lines += [f"  {_short(each['prompt'], _END)}", f"    -> {_short(each['completion'], _BEGINNING)}{ended}"]
            self.progress.say("\n".join(lines))
        self._watch.lap()

    def stopped_for_save(self, probe_seconds: float) -> None:
        """Take in how long training stood still for the checkpoint that is being written, and how much of it for its probe."""
        self._stall = {"stall_seconds": round(self._watch.lap(), 3), "probe_seconds": round(probe_seconds, 3)}

    def saved(self, *, step: int, path: str, num_bytes: int, seconds: float, untidy: str | None) -> None:
        """Take a complete checkpoint in."""
        if comm.rank() == 0:
            fields = {"bytes": num_bytes, "seconds": round(seconds, 3), **self._stall}
            self.folder.event("saved", step=step, path=path, **fields)
            self.progress.say(f"step {step}: saved {path}")
            if untidy is not None:
                self.progress.say(f"what is older than {path} could not be tidied up: {untidy}")

    def not_saved(self, reason: str) -> None:
        """Take in that a checkpoint could not be written, and that training goes on without it."""
        if comm.rank() == 0:
            self.folder.event("not_saved", reason=reason)
            self.progress.say(f"NOT SAVED, training goes on (checkpoint.on_failure = continue): {reason}")


_END, _BEGINNING = -90, 110
"""How much of a prompt (its end) and of a completion is shown."""


def _short(text: str, size: int) -> str:
    """The beginning of a text in a line, or its end where the size is negative."""
    line = " ".join(text.split())
    if len(line) <= abs(size):
        return line
    return f"{line[:size]}..." if size > 0 else f"...{line[size:]}"
