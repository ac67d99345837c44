"""How far a run has come: the few integers that a resume needs."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch import Tensor


class TrainState:
    """Counts over all ranks since the first start of the run."""

    def __init__(
        self,
        *,
        step: int = 0,
        rows_consumed: int = 0,
        tokens_seen: int = 0,
        targets_seen: int = 0,
        skipped_in_a_row: int = 0,
        stream: dict[str, Any] | None = None,
        best: dict[str, Any] | None = None,
    ) -> None:
        self.step = step
        """Optimizer steps that are complete."""
        self.rows_consumed = rows_consumed
        """Rows fed: the position in the order of the data."""
        self.skipped_in_a_row = skipped_in_a_row
        """Steps up to this one whose losses or gradients were not finite; 0 after a step that moved the weights."""
        self.stream = stream or {}
        """Where the lanes of a stream were when the run was resumed: the position of data that has no order of its own."""
        self.best = best or {}
        """What `evaluate.patience` goes by: `metric`, `value`, `step` of the best evaluation, `evaluations_since`."""
        self._targets_and_tokens: Tensor | None = None
        self._before = (targets_seen, tokens_seen)

    def advance(self, *, rows_consumed: int, targets_and_tokens: Tensor) -> None:
        """Count one optimizer step.

        Args:
            rows_consumed: the position after it.
            targets_and_tokens: what it fed, (2,) int64 on the device, where it stays until somebody asks.
        """
        self.step += 1
        self.rows_consumed = rows_consumed
        seen = self._targets_and_tokens
        self._targets_and_tokens = targets_and_tokens.clone() if seen is None else seen + targets_and_tokens

    def judge(self, metric: str, goal: str, value: float, min_improvement: float) -> None:
        """Take in an evaluation: whether it is the best so far. By another metric than before it begins anew."""
        before = self.best if self.best.get("metric") == metric else {}
        sign = 1 if goal == "lowest" else -1
        if not before or sign * (before["value"] - value) > min_improvement:
            self.best = {"metric": metric, "value": value, "step": self.step, "evaluations_since": 0}
        else:
            self.best = {**before, "evaluations_since": before["evaluations_since"] + 1}

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON. Waits for the device."""
        seen = self._targets_and_tokens
        targets, tokens = (0, 0) if seen is None else seen.tolist()
        return {
            "step": self.step,
            "rows_consumed": self.rows_consumed,
            "tokens_seen": self._before[1] + tokens,
            "targets_seen": self._before[0] + targets,
            "skipped_in_a_row": self.skipped_in_a_row,
            **({"best": self.best} if self.best else {}),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainState:
        """The state that `to_json` wrote."""
        names = ("step", "rows_consumed", "tokens_seen", "targets_seen")
        counts = {name: int(fields[name]) for name in names}
        return cls(
            **counts,
            skipped_in_a_row=int(fields.get("skipped_in_a_row", 0)),
            stream=fields.get("stream"),
            best=fields.get("best"),
        )


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of all randomness (dropout) in one step on one rank, so that no generator's state has to be saved."""
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def demand_determinism() -> None:
    """Let torch take kernels that give the same bits again, and raise where it has none. Before the device is used.

    Source: torch 2.13, documentation of `torch.use_deterministic_algorithms`; cuBLAS is told by the environment.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # costs a write of all memory


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed what a step draws from, on the host and on the rank's device; other devices are left alone.

    torch.manual_seed also leaves the seed for every kind of device that is not in use, each time with the text of the stack:
    some tenths of a millisecond a step. Source: torch 2.13, torch/cuda, torch/xpu and torch/mtia, `_lazy_call`.
    """
    number = step_seed(seed, step, rank)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
