"""Find out which ranks had a loss that is not finite, and what it was computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_trainer import comm

SamplesOf = Callable[[int, int], list[str]]
"""(rows consumed before a step, micro-batch from 0) -> the samples this rank feeds there, as path:line; empty if unknown."""
SHOWN = 8
"""Samples that are named at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """A step that left the weights alone."""

    step: int
    """Steps that are complete with it, as everything that is logged counts them."""
    micro_batches: dict[int, list[int]]
    """Rank -> its micro-batches, from 0, whose loss was not finite; empty when only gradients were not."""
    samples: list[str]
    """path:line of what these micro-batches hold, at most SHOWN."""
    num_samples: int
    """How many they hold."""

    def __str__(self) -> str:
        if not self.micro_batches:
            return f"step {self.step}: every loss is finite, but the gradient is not"
        ranks = [
            f"rank {rank} (micro-batch {', '.join(str(each + 1) for each in micro)})"
            for rank, micro in self.micro_batches.items()
        ]
        more = f" and {len(ranks) - SHOWN} more ranks" if len(ranks) > SHOWN else ""
        text = f"step {self.step}: the loss is not finite on {', '.join(ranks[:SHOWN])}{more}"
        if self.samples:
            rest = self.num_samples - len(self.samples)
            text += f", computed from {', '.join(self.samples)}" + (f" and {rest} more samples" if rest else "")
        return text

    def as_fields(self) -> dict[str, Any]:
        """For events.jsonl; micro-batches count from 1, as in the text."""
        where = {str(rank): [each + 1 for each in micro] for rank, micro in self.micro_batches.items()}
        return {"step": self.step, "micro_batches": where, "samples": self.samples, "num_samples": self.num_samples}


def no_samples(rows_consumed: int, micro_batch: int) -> list[str]:
    """What a run answers that cannot name its samples."""
    return []


def find(step: int, losses: list[Tensor], samples_of: Callable[[int], list[str]]) -> NonFinite:
    """Ask every rank for its losses. Collective; waits for the device.

    Args:
        step: steps that are complete.
        losses: of this rank's micro-batches.
        samples_of: micro-batch -> its samples, on this rank.
    """
    finite = torch.isfinite(torch.stack(losses)).tolist()
    micro_batches = [index for index, each in enumerate(finite) if not each]
    samples = list(dict.fromkeys(sample for index in micro_batches for sample in samples_of(index)))
    everyone = comm.gather_objects((micro_batches, samples[:SHOWN], len(samples)), comm.HOST)
    return NonFinite(
        step=step,
        micro_batches={rank: each for rank, (each, _, _) in enumerate(everyone) if each},
        samples=[sample for _, some, _ in everyone for sample in some][:SHOWN],
        num_samples=sum(count for _, _, count in everyone),
    )
