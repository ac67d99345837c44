"""The few types that parts hand to one another without importing one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100
"""The label of a position that is no target; torch's cross entropy uses the same number."""


UNWANTED, WANTED, OTHERS, UNUSED = 1, 2, 3, 4
"""Kinds of documents of labelled answers: an answer that is not wanted, one that is, its prompt with the answer of another
record, and the same where there is no other; 0 is any other document."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows one rank feeds in one forward, on the CPU, as the loader makes them.

    All tensors (rows, seq_len), int64 where nothing else is said.
    """

    input_ids: Tensor
    """Token ids; 0 in the padded tail."""
    labels: Tensor
    """labels[r, t] is the token to be predicted *at* position t (the next one of the same document), or IGNORED."""
    position_ids: Tensor
    """Restart at 0 with each document; the padded tail counts as a document of its own."""
    is_token: Tensor
    """Bool: whether the position holds a token of the data; False in the padded tail."""
    kinds: Tensor | None = None
    """Of each document, in their order: (num_documents,) int64; None where all are 0."""
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    """What else is known of each document, by name: (num_documents,) float64."""

    @property
    def num_tokens(self) -> int:
        """Positions that hold a token, so without the padded tails."""
        return int(self.is_token.sum())


@dataclass(frozen=True, slots=True)
class ModelBatch:
    """A micro-batch in the layout the attention implementation wants."""

    inputs: Mapping[str, Any]
    """Keyword arguments of the model's forward; `input_ids` (rows, positions) among them."""
    target_positions: Tensor
    """Where the targets are: indices (num_targets,) int64 into the positions of all rows laid end to end."""
    targets: Tensor
    """The token to be predicted at each of them: (num_targets,) int64."""
    num_tokens: int
    """Positions that hold a token, so without padding."""
    attention_pairs: int
    """Pairs (token, token it attends to) under full causal attention inside each document; a token attends to itself too."""
    sequence_lengths: Tensor | None = None
    """Targets of each document that has any, in the order of the targets: (num_sequences,) int64, each at least 1."""
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    """What else is known of each of them, by name: (num_sequences,) float64."""
    wanted: Tensor | None = None
    """Of labelled answers: whether each is wanted, (num_sequences,) bool."""
    num_wanted: int = 0
    """How many are; known without asking the device."""
    ahead: ModelBatch | None = None
    """What is computed before the step only, see `Objective.look_ahead`."""
    known: Tensor | None = None
    """What that gave, over the whole step."""

    @property
    def num_positions(self) -> int:
        """Positions the model computes, with padding where the layout has any."""
        return int(self.inputs["input_ids"].numel())

    @property
    def num_sequences(self) -> int:
        """Documents that have a target; known without asking the device."""
        assert self.sequence_lengths is not None, "`model.attention.arrange` counts them"
        return self.sequence_lengths.numel()

    @property
    def num_targets(self) -> int:
        """Labels that count in the loss; known without asking the device."""
        return self.targets.numel()

    def to(self, device: torch.device) -> ModelBatch:
        """The same on a device; the copy does not wait where the memory is pinned."""
        return ModelBatch(
            inputs={
                name: value.to(device, non_blocking=True) if hasattr(value, "to") else value
                for name, value in self.inputs.items()
            },
            target_positions=self.target_positions.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            num_tokens=self.num_tokens,
            attention_pairs=self.attention_pairs,
            sequence_lengths=(None if self.sequence_lengths is None else self.sequence_lengths.to(device, non_blocking=True)),
            numbers={name: value.to(device, non_blocking=True) for name, value in self.numbers.items()},
            wanted=None if self.wanted is None else self.wanted.to(device, non_blocking=True),
            num_wanted=self.num_wanted,
            ahead=None if self.ahead is None else self.ahead.to(device),
        )


MetricSums = Mapping[str, tuple["Tensor", int]]
"""Name -> (sum, a scalar on the device without a gradient; of how many things). The names are the same on every rank."""


@dataclass(frozen=True, slots=True)
class LossSums:
    """What an objective makes of a micro-batch.

    The loss of a step is the sum over its terms k of (sum of terms[k] over all micro-batches and ranks) / units[k], where units
    are those of `Objective.units`, added up in the same way.
    """

    terms: Tensor
    """(num_terms,) with a gradient."""
    metrics: MetricSums


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: how a micro-batch is computed, and what its sums are means over."""

    sums: Callable[[Callable[..., Tensor], ModelBatch], LossSums]
    """(engine, batch on the engine's device) -> sums. Calls the engine equally often on every rank, with or without targets."""
    units: Callable[[ModelBatch], tuple[int, ...]]
    """(batch) -> what each term is a mean over: targets, pairs; (num_terms), known without computing anything."""
    look_ahead: Callable[[Callable[..., Tensor], ModelBatch], Tensor] | None = None
    """(engine, batch on its device) -> sums, (any,), of what the loss of every micro-batch depends on. They are added up over
    all micro-batches and ranks before the first forward of a step, in evaluation mode, without gradients, to `batch.known`."""
