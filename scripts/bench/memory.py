"""What the model's states take, in bytes of live tensors a parameter, beside theory and plan; and how long a sequence may be.

States: the bytes of all tensors that a rank holds, counted in the process of `ds_trainer train` after each backward pass, of
which the most is shown, and between two steps. Stage 1 has two micro-steps: it holds all gradients only while they add up.
Theory is ZeRO's own count (Rajbhandari et al., 2020, section 3.1): 2 bytes of weights, 2 of gradients, 12 of Adam, each divided
by the ranks from the stage on that divides it. The plan's is what `ds_trainer plan` counts for the same run file. The peak of a
whole run beside the plan is measured by plan_accuracy.py.
Sequence: the longest row whose training stays below a given resident memory, found by halving; ours against the bare loop with
transformers' own loss, whose logits are whole in memory.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import SCRATCH, finish, goal, parse_arguments, versions
from turns import Live, llama, write_case, write_texts

MIB = 2**20
CASES = [(1, 1, False), (2, 1, False), (3, 1, False), (2, 1, True), (1, 2, False), (2, 2, False), (3, 2, False), (2, 2, True)]
"""Stage, ranks, optimizer offloaded."""
LIMIT = 1280 * MIB
LONGEST = 8192
STEP = 256
"""Positions to which the longest sequence is found."""


def main() -> None:
    arguments = parse_arguments(__doc__)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    goals = []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        corpus = write_texts(Path(scratch) / "corpus")
        rows: list[list[Any]] = []
        for stage, ranks, offload in CASES[1:2] if arguments.quick else CASES:
            row, found = states(corpus, Path(scratch), stage, ranks, offload)
            rows.append(row)
            goals += found
            print(row, flush=True)
        lengths = {} if arguments.quick else {who: longest(corpus, Path(scratch), who) for who in ("ours", "bare")}
    tables = [
        {
            "title": "Bytes of live tensors for each parameter, on rank zero, in bf16 with AdamW",
            "columns": [
                *("stage", "ranks", "optimizer on", "after backward", "plan", "off by", "theory", "between steps", "theory"),
            ],
            "rows": rows,
        }
    ]
    if lengths:
        ratio = lengths["ours"] / lengths["bare"]
        goals.append(goal("longest row in the same memory, against transformers' own loss", 2, ratio, "times", at_least=True))
        tables.append(
            {
                "title": f"Longest row below {LIMIT // MIB} MiB resident; 11.5 M parameters, a vocabulary of 32,768",
                "columns": ["loop", "positions"],
                "rows": [["ours, head and loss in chunks", lengths["ours"]], ["bare, logits whole", lengths["bare"]]],
            }
        )
    finish(
        "memory",
        quick=arguments.quick,
        goals=goals,
        tables=tables,
        packages=versions("torch", "deepspeed", "transformers"),
    )


# -- states -------------------------------------------------------------------------------------------------------------


def states(corpus: Path, folder: Path, stage: int, ranks: int, offload: bool) -> tuple[list[Any], list[Any]]:
    """A row of the table, and its goal."""
    name = f"states_{stage}_{ranks}_{offload}"
    config = write_case(
        corpus,
        folder,
        name,
        model=llama(768, 6, vocabulary=4096),
        micro=1,
        seq_len=32,
        stage=stage,
        offload=offload,
        bucket=10**6,
    )
    parameters, planned = plan_of(config, ranks)
    with Live("ours", config, ranks=ranks, bytes=True) as live:
        live.ready().turn(3)
        backward, between = (each / parameters for each in live.ask("seen")[0])
    theory = theory_of(stage, ranks, offload)
    error = 100 * (planned / backward - 1)
    where = "cpu" if offload else "device"
    row = [stage, ranks, where, backward, planned, f"{error:+.1f}%", theory[0], between, theory[1]]
    what = f"ZeRO-{stage}, {ranks} {'rank' if ranks == 1 else 'ranks'}{', optimizer on cpu' if offload else ''}"
    return row, [goal(f"{what}: plan of the states, off by", 3, abs(error), "%")]


def theory_of(stage: int, ranks: int, offload: bool) -> tuple[float | None, float | None]:
    """Bytes a parameter after backward and between steps; of offloaded states the paper does not say what lies where."""
    if offload:
        return None, None
    weights = 2 / (ranks if stage == 3 else 1)
    gradients = 2 / (ranks if stage >= 2 else 1)
    adam = 12 / ranks
    # Stage 3 keeps its gradients in one buffer for good.
    return weights + gradients + adam, weights + adam + (gradients if stage == 3 else 0)


def plan_of(config: Path, ranks: int) -> tuple[int, float]:
    """The number of parameters, and how many bytes the plan counts for each while the gradients are there."""
    from ds_trainer.plan.cluster import Cluster
    from ds_trainer.plan.memory import states_of
    from ds_trainer.plan.story import Request, make_plan

    plan = make_plan(Request(config=config, cluster=Cluster(nodes=1, ranks_per_node=ranks, device_type="cpu")))
    parameters = plan.shape.total
    if plan.holding.optimizer_on == "none":
        return parameters, sum(states_of(plan.holding, parameters=parameters, trained=plan.shape.trained).values()) / parameters
    parts = plan.memory.device["forward and backward"]
    return parameters, sum(parts[name] for name in OFFLOADED) / parameters


OFFLOADED = ("weights", "optimizer states", "fp32 gradients", "updated weights on their way", "offload buffer")
"""What of a plan lies in tensors that stay for longer than an operation."""


# -- sequence -----------------------------------------------------------------------------------------------------------


def longest(corpus: Path, folder: Path, who: str) -> int:
    """The most positions of a row that are trained below the limit, in steps of STEP."""
    fits, too_long = 0, LONGEST // STEP + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        peak = peak_of(corpus, folder, who, middle * STEP)
        print(f"{who}: {middle * STEP} positions take {peak / MIB:.0f} MiB", flush=True)
        fits, too_long = (middle, too_long) if peak <= LIMIT else (fits, middle)
    return fits * STEP


def peak_of(corpus: Path, folder: Path, who: str, seq_len: int) -> int:
    """Resident bytes at most of a process that trains three steps on one row of so many positions."""
    config = write_case(
        corpus,
        folder,
        f"length_{seq_len}",
        model=llama(256, 4, vocabulary=32768, positions=LONGEST + STEP),
        micro=1,
        seq_len=seq_len,
        stage=2,
    )
    with ExitStack() as stack:
        live = stack.enter_context(Live(who, config, own_loss=True, ahead=2))
        live.ready().turn(2)
        return int(live.ask("peak")[0])


if __name__ == "__main__":
    main()
