"""How cost grows: with the number of samples, of ranks and of parameters; and the exponent of the growth, fitted.

Samples: deciding which document goes to which row, the whole of a pack, and the first row of a run, from 1e4 to 1e7 documents.
Ranks: CPU time of a rank for a step at ZeRO-2 with the same rows for each rank, `ds_trainer train` beside the bare loop of
turns.py whose losses are equal in every bit; on fewer cores than ranks the CPU time still counts, the wall time does not.
Parameters: CPU time of a step of ours on the same rows, from 1.8 M to 29.5 M.
The exponent is the slope of a straight line through the logarithms; 1 is growth in proportion, 0 is none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import CAPACITY, SCRATCH, finish, goal, lengths_of, parse_arguments, slope, take_turns, versions
from turns import LARGE, SMALL, Live, compare, llama, write_case, write_texts

TINY = ("1.8 M", 128, 4)
MODELS = {TINY: 1.84e6, SMALL: 5.26e6, LARGE: 29.5e6}
LAW = "Alpaca-like"


def main() -> None:
    arguments = parse_arguments(__doc__)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    goals: list[dict[str, Any]] = []
    tables = [by_samples([10**4, 10**5] if arguments.quick else [10**4, 10**5, 10**6, 10**7], goals)]
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        corpus = write_texts(Path(scratch) / "corpus")
        tables.append(by_ranks(corpus, Path(scratch), [1, 2] if arguments.quick else [1, 2, 4], goals, arguments.quick))
        models = list(MODELS)[:2] if arguments.quick else list(MODELS)
        tables.append(by_parameters(corpus, Path(scratch), models, goals, arguments.quick))
    finish(
        "scaling",
        quick=arguments.quick,
        goals=goals,
        tables=tables,
        packages=versions("torch", "deepspeed", "transformers"),
        seed=0,
    )


def table_of(what: str, over: str, sizes: Sequence[Any], found: dict[str, list[float]], exponents: dict[str, float]) -> Any:
    rows = [[name, *values, exponents[name]] for name, values in found.items()]
    return {"title": what, "columns": [over, *(f"{size:,}" for size in sizes), "exponent"], "rows": rows}


def by_samples(sizes: list[int], goals: list[dict[str, Any]]) -> Any:
    """Seconds for so many documents; of the first row, microseconds."""
    from order import measure
    from packing import whole_documents

    from ds_trainer.data.pack import best_fit_decreasing, pack

    found: dict[str, list[float]] = {"deciding, ms": [], "whole pack, ms": [], "first row of a run, ms": []}
    for size in sizes:
        lengths = lengths_of(LAW, size)
        segments = whole_documents(lengths)
        took = take_turns(
            {
                "deciding, ms": lambda lengths=lengths: best_fit_decreasing(lengths, CAPACITY),
                "whole pack, ms": lambda segments=segments: pack(segments, CAPACITY),
            },
            repeats=3,
            each_at_least=0.1,
        )
        for name, each in took.items():
            found[name].append(each["cpu_s"] * 1e3)
        found["first row of a run, ms"].append(sorted(measure("ours", size)["first_s"] * 1e3 for _ in range(5))[2])
    exponents = {name: slope(sizes, values) for name, values in found.items()}
    goals += [goal(f"samples: {name.split(',')[0]}, exponent", 1.1, each) for name, each in exponents.items()]
    return table_of(f"By the number of documents ({LAW} lengths), CPU", "what", sizes, found, exponents)


def by_ranks(corpus: Path, folder: Path, ranks: list[int], goals: list[dict[str, Any]], quick: bool) -> Any:
    found: dict[str, list[float]] = {"bare, ms": [], "ours, ms": []}
    ratios = []
    for count in ranks:
        config = write_case(
            corpus, folder, f"ranks_{count}", model=llama(*TINY[1:]), micro=2, seq_len=128, stage=2, log_every=4
        )
        with ExitStack() as stack:
            lives = {who: stack.enter_context(Live(who, config, ranks=count)) for who in ("bare", "ours")}
            took, _ = compare(lives, steps=4, turns=4 if quick else 10, warm_up=4, equal=("bare", "ours"))
        for who in lives:
            found[f"{who}, ms"].append(took[who]["cpu_s"] / count * 1e3)
        ratios.append(took["ours"]["ratio"])
    exponents = {name: slope(ranks, values) for name, values in found.items()}
    goals.append(goal(f"{ranks[-1]} ranks: our step", 1.05, ratios[-1], "of bare DeepSpeed's"))
    table = table_of(
        f"By the number of ranks, CPU of one rank for a step, {TINY[0]}, 2 x 128 positions a rank",
        "loop",
        ranks,
        found,
        exponents,
    )
    table["rows"].append(["ours, bare = 1", *ratios, None])
    return table


def by_parameters(corpus: Path, folder: Path, models: list[Any], goals: list[dict[str, Any]], quick: bool) -> Any:
    with ExitStack() as stack:
        lives = {}
        for model in models:
            name = model[0].replace(" ", "")
            config = write_case(
                corpus, folder, f"model_{name}", model=llama(*model[1:]), micro=2, seq_len=128, stage=2, log_every=2
            )
            lives[model[0]] = stack.enter_context(Live("ours", config)).ready()
        took, _ = compare(lives, steps=2, turns=4 if quick else 8, warm_up=3)
    sizes = [MODELS[model] for model in models]
    found = {"ours, ms": [each["cpu_s"] * 1e3 for each in took.values()]}
    exponents = {name: slope(sizes, values) for name, values in found.items()}
    goals.append(goal("parameters: our step, exponent", 1.1, exponents["ours, ms"]))
    return table_of(
        "By the number of parameters, CPU of a step at ZeRO-2, 2 x 128 positions",
        "loop",
        [int(size) for size in sizes],
        found,
        exponents,
    )


if __name__ == "__main__":
    main()
