"""What share of the positions that are fed are tokens of the data: computed from lengths, so the same on any machine.

1e6 documents of each law, at most 2048 tokens long:
  packed          rows of 2048 filled by ds_trainer (best-fit decreasing over all documents)
  pad to 2048     a document a row
  pad to longest  batches of 8 in random order, each padded to its longest document
  by length       batches of 8 out of 400 documents sorted by length (what group_by_length does in transformers: 50 batches)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import CAPACITY, LAWS, finish, goal, lengths_of, parse_arguments, versions

from ds_trainer.data.pack import best_fit_decreasing

BATCH, GROUPED = 8, 50


def main() -> None:
    arguments = parse_arguments(__doc__)
    count = 10**5 if arguments.quick else 10**6
    rows: list[list[Any]] = []
    goals = []
    for law in LAWS:
        lengths = lengths_of(law, count)
        packed = int(best_fit_decreasing(lengths, CAPACITY).max()) + 1
        share = {
            "packed (ds_trainer)": lengths.sum() / (packed * CAPACITY),
            "batches of 8 by length": share_of(by_length(lengths)),
            "batches of 8, pad to longest": share_of(lengths.reshape(-1, BATCH)),
            "pad to 2048": lengths.mean() / CAPACITY,
        }
        goals.append(goal(f"{law}: tokens of the positions fed", 0.98, float(share["packed (ds_trainer)"]), at_least=True))
        rows += [[law, float(lengths.mean()), how, float(each), float(1 / each)] for how, each in share.items()]
    table = {
        "title": f"Tokens as a share of the positions fed, {count:,} documents",
        "columns": ["law", "mean length", "how", "share", "positions fed for each token"],
        "rows": rows,
    }
    finish("padding", quick=arguments.quick, goals=goals, tables=[table], packages=versions())


def share_of(batches: Any) -> float:
    """Of batches (num_batches, BATCH), each padded to its longest."""
    return float(batches.sum() / (batches.max(axis=1).sum() * BATCH))


def by_length(lengths: Any) -> Any:
    group = BATCH * GROUPED
    return np.sort(lengths.reshape(-1, group), axis=1).reshape(-1, BATCH)


if __name__ == "__main__":
    main()
