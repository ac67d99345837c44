"""The few types that parts hand to one another without importing one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100
"""The label of a position that is no target; torch's cross entropy uses the same number."""


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
    num_pairs: int
    """Pairs (token, token it attends to) under full causal attention inside each document; a token attends to itself too."""

    @property
    def num_positions(self) -> int:
        """Positions the model computes, with padding where the layout has any."""
        return int(self.inputs["input_ids"].numel())

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
            num_pairs=self.num_pairs,
        )
