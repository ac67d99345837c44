"""How far a run has come: the few integers that a resume needs."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class TrainState:
    """Counts over all ranks since the first start of the run."""

    step: int = 0
    """Optimizer steps that are complete."""
    rows_consumed: int = 0
    """Rows fed: the position in the order of the data."""
    tokens_seen: int = 0
    """Token ids fed, padding not counted."""
    targets_seen: int = 0
    """Labels that counted in a loss."""

    def to_json(self) -> dict[str, int]:
        """The fields as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainState:
        """The state that `to_json` wrote."""
        return cls(**{name: int(fields[name]) for name in cls.__slots__})


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of all randomness (dropout) in one step on one rank, so that no generator's state has to be saved."""
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
