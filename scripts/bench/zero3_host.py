"""What a step costs the host for each parameter tensor: 32 layers so narrow that computing takes next to no time.

Loops take turns, each in a process of its own, on rows of 8 positions: torch alone, DeepSpeed at ZeRO-2 and ZeRO-3 in a loop
written by hand, and `ds_trainer train` at both. The losses of ours and of the bare loop at the same stage must be equal in
every bit before they are timed. On a GPU this time is what a step takes at least, however little there is to compute.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import SCRATCH, finish, goal, parse_arguments, versions
from turns import Live, compare, llama, require_equal, write_case, write_texts

LAYERS, HIDDEN, POSITIONS = 32, 64, 8
TENSORS = 9 * LAYERS + 2
WHO = {
    "ZeRO-3, bare": ("bare", 3),
    "ZeRO-3, ours": ("ours", 3),
    "ZeRO-2, bare": ("bare", 2),
    "ZeRO-2, ours": ("ours", 2),
    "torch": ("torch", 2),
}


def main() -> None:
    arguments = parse_arguments(__doc__)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch, ExitStack() as stack:
        corpus = write_texts(Path(scratch) / "corpus")
        lives = {}
        for name, (who, stage) in WHO.items():
            config = write_case(
                corpus,
                Path(scratch),
                f"{who}_{stage}",
                model=llama(HIDDEN, LAYERS, vocabulary=512),
                micro=1,
                seq_len=POSITIONS,
                stage=stage,
            )
            lives[name] = stack.enter_context(Live(who, config)).ready()  # one after the other: they prepare the same rows
        turns = 3 if arguments.quick else 12
        found, compared = compare(lives, steps=8, turns=turns, warm_up=5, equal=("ZeRO-3, bare", "ZeRO-3, ours"), falls=False)
        require_equal({name: lives[name].losses() for name in ("ZeRO-2, bare", "ZeRO-2, ours")}, falls=False)
    rows: list[list[Any]] = []
    for name, each in found.items():
        rows.append([name, each["cpu_s"] * 1e3, each["cpu_s_min"] * 1e3, each["cpu_s"] / TENSORS * 1e3, each["ratio"]])
    table = {
        "title": f"A step of {LAYERS} layers of width {HIDDEN}, {TENSORS} parameter tensors, 1 x {POSITIONS} positions, CPU",
        "columns": ["loop", "ms a step", "least, ms", "ms a tensor", "bare ZeRO-3 = 1"],
        "rows": rows,
    }
    two = found["ZeRO-2, ours"]["ratio"] / found["ZeRO-2, bare"]["ratio"]
    finish(
        "zero3_host",
        quick=arguments.quick,
        goals=[
            goal("ZeRO-3: our step", 0.62, found["ZeRO-3, ours"]["ratio"], "of bare DeepSpeed's"),
            goal("ZeRO-2: our step", 1.1, two, "of bare DeepSpeed's"),
        ],
        tables=[table],
        notes=[f"Losses of {compared} steps were equal in every bit at each stage."],
        packages=versions("torch", "deepspeed", "transformers"),
    )


if __name__ == "__main__":
    main()
