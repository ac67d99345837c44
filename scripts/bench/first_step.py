"""From the start of a process to the end of the first step of a tiny model; and how soon the command line answers.

Each start is a new process, in turns: a script around `deepspeed.initialize` written by hand that makes up its rows, the
command `ds_trainer debug`, and both under torchrun. The clock is read inside the process when the step is done: its CPU time
from its first instruction, with that of its children, and the wall time from the moment it was started. What torchrun itself
takes is measured with a script that does nothing, and taken off the wall time. Caches are warm: the op that DeepSpeed would
compile on a CPU is switched off for both, files are in the page cache, and the data was tokenised before.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SCRATCH, child_environment, cpu_seconds, finish, goal, parse_arguments, versions
from turns import llama, write_case, write_texts

TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "1"]
SAYS = "DS_TRAINER_BENCH_SAYS"
"""The variable with the file into which a start says when its step was done: its output goes to the run folder."""


def main() -> None:
    if sys.argv[1:2] == ["--child"]:  # before anything else: what follows may be our command line
        {"bare": bare, "ours": ours, "nothing": report}[sys.argv[2]](*sys.argv[3:])
    arguments = parse_arguments(__doc__)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    repeats = 2 if arguments.quick else 7
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        corpus = write_texts(Path(scratch) / "corpus")
        config = str(write_case(corpus, Path(scratch), "run", model=llama(64, 2, vocabulary=512), micro=2, seq_len=64, stage=2))
        child = [sys.executable, __file__, "--child"]
        launched = [*TORCHRUN, __file__, "--child"]
        starts = {
            "bare": [*child, "bare"],
            "ours, debug": [*child, "ours", "debug", "--steps", "1", "--config", config],
            "nothing, torchrun": [*launched, "nothing"],
            "bare, torchrun": [*launched, "bare"],
            "ours, torchrun": [*launched, "ours", "train", "--config", config],
        }
        took = in_turns({name: lambda command=command: started(command) for name, command in starts.items()}, repeats)
        commands = {
            "--help": (["--help"], 0),
            "train without a launcher, refused": (["train", "--config", config], 2),
            "check": (["check", "--config", config], 0),
            "check --static": (["check", "--static", "--config", config], 0),
            "python that imports nothing": ([], 0),
        }
        if "--static" not in subprocess.run(module("check", "--help"), capture_output=True, text=True, check=False).stdout:
            del commands["check --static"]
        answers = in_turns({name: lambda each=each: answered(*each) for name, each in commands.items()}, repeats + 2)
    launcher = took["nothing, torchrun"][1]
    rows: list[list[Any]] = []
    for name, (cpu, wall) in took.items():
        base = took["bare, torchrun" if "torchrun" in name else "bare"]
        wall -= launcher if "torchrun" in name else 0
        base_wall = base[1] - (launcher if "torchrun" in name else 0)
        rows.append([name, cpu, wall, cpu / base[0], wall / base_wall])
    by_name = {row[0]: row for row in rows}
    limits = {"--help": 0.3, "train without a launcher, refused": 0.5, "check": 4.0, "check --static": 0.5}
    goals = [goal(f"{name}: first step", 1.1, by_name[name][3], "of bare") for name in ("ours, debug", "ours, torchrun")]
    goals += [goal(name, limit, answers[name][0], "s") for name, limit in limits.items() if name in answers]
    tables = [
        {
            "title": f"To the end of the first step; wall without the {launcher:.1f} s until torchrun starts a process",
            "columns": ["start", "CPU, s", "wall, s", "bare = 1, CPU", "bare = 1, wall"],
            "rows": rows,
        },
        {
            "title": "Until the command line has answered",
            "columns": ["command", "CPU, s", "wall, s"],
            "rows": [[name, *each] for name, each in answers.items()],
        },
    ]
    finish(
        "first_step",
        quick=arguments.quick,
        goals=goals,
        tables=tables,
        packages=versions("torch", "deepspeed", "transformers", "typer"),
    )


def in_turns(calls: dict[str, Any], repeats: int) -> dict[str, tuple[float, float]]:
    """Medians of (CPU, wall) seconds; the first round warms the caches."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            seconds = call()
            if turn:
                found[name].append(seconds)
    return {name: tuple(map(statistics.median, zip(*each, strict=True))) for name, each in found.items()}  # type: ignore[misc]


def environment() -> dict[str, str]:
    return child_environment() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def started(command: list[str]) -> tuple[float, float]:
    """(CPU, wall) seconds that a start says it took."""
    with tempfile.NamedTemporaryFile("r") as said:
        begun = time.time()
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment() | {SAYS: said.name}, check=False, timeout=300
        )
        words = said.read().split()
    if len(words) != 2:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(words[0]), float(words[1]) - begun


def module(*words: str) -> list[str]:
    return [sys.executable, "-m", "ds_trainer", *words]


def answered(words: list[str], code: int) -> tuple[float, float]:
    """(CPU, wall) seconds of a command; of Python alone without words."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    command = module(*words) if words else [sys.executable, "-c", "pass"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    return cpu_seconds() - cpu, time.perf_counter() - wall


def report() -> None:
    """Say when the step was done, and end."""
    Path(os.environ[SAYS]).write_text(f"{cpu_seconds()} {time.time()}")
    os._exit(0)


def ours(*words: str) -> None:
    """The command itself; it ends with its first step."""
    from ds_trainer import cli, loop

    plain = loop.train

    def train(engine: Any, windows: Any, state: Any, plan: Any, recorder: Any, *more: Any, **named: Any) -> int:
        record = recorder.step

        def step(**fields: Any) -> None:
            record(**fields)
            report()

        recorder.step = step
        return plain(engine, windows, state, plan, recorder, *more, **named)

    loop.train = train
    raise SystemExit(cli.main(list(words)))


def bare() -> None:
    """A step of the same model, with transformers' own loss, on rows made up."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        from helpers import free_port

        os.environ["MASTER_PORT"] = str(free_port())
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    fields = llama(64, 2, vocabulary=512)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        },
    )
    ids = torch.randint(0, 320, (2, 64))
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    print(float(loss))
    report()


if __name__ == "__main__":
    main()
