"""What a save costs: how long training stands still for it, and how fast it reaches the disk.

Bandwidth: each rank writes its state as in a save (`checkpoint.saver`, with hash, fsync, vote and rename), in turns with a
plain write and fsync of the same bytes by the same ranks to the same disk; both then remove what they wrote before. Beside it
what of a save in the background training has to wait for, the copy of the state. All with random numbers as the state.
Stall: a run of two ranks with a model of 30 M parameters, with and without `checkpoint.background`, by its own events. The
probe, one forward of a few rows whose loss a resume must find again, is the same for both and shown beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import MIB, SCRATCH, child_environment, finish, goal, versions
from helpers import write_corpus, write_run

from ds_trainer import comm
from ds_trainer.checkpoint.keep import Keep
from ds_trainer.checkpoint.saver import Saver

PIECE = 4 * MIB
MODEL = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 640,
    "intermediate_size": 1706,
    "num_hidden_layers": 6,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
"""29.7 M parameters: with AdamW 356 MB of state."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 MB only and no runs; prints, writes no results")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each (default 5)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, megabytes, repeats = arguments.child
        child(Path(folder), int(megabytes), int(repeats))
        return
    SCRATCH.mkdir(parents=True, exist_ok=True)
    rows, goals = [], []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        for ranks in (1, 2):
            for megabytes in (20,) if arguments.quick else (50, 500):
                found = in_ranks(ranks, Path(scratch), megabytes, arguments.repeats)
                rows.append(
                    [ranks, megabytes, found["save"], found["raw"], found["ratio"], found["copy"], found["save_seconds"]]
                )
                name = f"{ranks} {'rank' if ranks == 1 else 'ranks'}, {megabytes} MB each: bandwidth"
                goals.append(goal(name, 0.85, found["ratio"], "of a plain write", at_least=True))
                print(rows[-1], flush=True)
        tables = [
            {
                "title": "Writing a checkpoint beside a plain write and fsync of the same bytes, MB/s of all ranks together",
                "columns": ["ranks", "MB each", "save", "plain", "plain = 1", "copy of the state, s", "save, s"],
                "rows": rows,
            }
        ]
        if not arguments.quick:
            table, ratio = stalls(Path(scratch))
            tables.append(table)
            goals.append(goal("stall of a save in the background", 0.15, ratio, "of a blocking one"))
    finish("save", quick=arguments.quick, goals=goals, tables=tables, packages=versions("torch", "deepspeed"))


def in_ranks(ranks: int, folder: Path, megabytes: int, repeats: int) -> dict[str, float]:
    """The medians that rank zero found."""
    command = ["torchrun", "--nproc-per-node", str(ranks), __file__, "--child", str(folder), str(megabytes), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def child(folder: Path, megabytes: int, repeats: int) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with comm.process_group(torch.device("cpu"), rank=rank, world_size=ranks, timeout_seconds=300):
        count = megabytes * 10**6 // 4 // 40
        slices = {(f"layer.{each}", "fp32", rank * count): torch.randn(count) for each in range(40)}
        num_bytes = ranks * sum(each.nbytes for each in slices.values())
        saver = Saver(folder / "saves", Keep(last=1), background=False)
        took: dict[str, list[float]] = {"save": [], "raw": [], "copy": []}

        def save(step: int) -> None:
            saver.start(step, slices, {})
            saver.wait()
            saver.poll()

        def raw(step: int) -> None:
            with (folder / f"raw_{rank}_{step}").open("wb") as file:
                for each in slices.values():
                    view = memoryview(each.view(torch.uint8).numpy())
                    for start in range(0, len(view), PIECE):
                        file.write(view[start : start + PIECE])
                file.flush()
                os.fsync(file.fileno())
            (folder / f"raw_{rank}_{step - 1}").unlink(missing_ok=True)  # as a save removes the checkpoint before

        def copy(step: int) -> None:
            copies = [each.to("cpu", copy=True) for each in slices.values()]  # all are there at the same time
            copies.clear()

        for step in range(1, repeats + 2):
            for name, run in {"save": save, "raw": raw, "copy": copy}.items():
                comm.gather_objects(None)
                begun = time.perf_counter()
                run(step)
                comm.gather_objects(None)
                if step > 1:  # the first one warms up
                    took[name].append(time.perf_counter() - begun)
        middle = {name: statistics.median(each) for name, each in took.items()}
        for left in folder.glob(f"raw_{rank}_*"):
            left.unlink()
        if rank == 0:
            shutil.rmtree(folder / "saves")
            found = {
                "save": num_bytes / middle["save"] / 1e6,
                "raw": num_bytes / middle["raw"] / 1e6,
                "ratio": statistics.median(plain / ours for plain, ours in zip(took["raw"], took["save"], strict=True)),
                "copy": middle["copy"],
                "save_seconds": middle["save"],
            }
            print(json.dumps(found))


def stalls(folder: Path) -> tuple[dict[str, Any], float]:
    """How long training stood still for each save of a run, without its probe and for it, and how long the save took."""
    corpus = folder / "corpus"
    corpus.mkdir()
    write_corpus(corpus)
    seen: dict[bool, list[tuple[float, float, float, int]]] = {True: [], False: []}
    for turn in range(4):
        background = turn % 2 == 0
        name = f"stall_{turn}"
        config = write_run(
            corpus,
            folder,
            name,
            model={"config": MODEL, "tokenizer": str(corpus / "tokenizer")},
            train={"max_steps": 12},
            checkpoint={"every_steps": 4, "background": background, "keep_last": 1},
        )
        command = ["torchrun", "--nproc-per-node", "2", "-m", "ds_trainer", "train", "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        events = [json.loads(line) for line in (folder / name / "events.jsonl").read_text().splitlines()]
        found = [
            (each["stall_seconds"] - each["probe_seconds"], each["probe_seconds"], each["seconds"], each["bytes"])
            for each in events
            if each["event"] == "saved"
        ]
        seen[background] += found
        shutil.rmtree(folder / name)
        print(f"background {background}: (stall, probe, seconds, bytes) {found}", flush=True)
    middle = {
        background: [statistics.median(each[column] for each in found) for column in range(4)]
        for background, found in seen.items()
    }
    table = {
        "title": "How long a run of two ranks stands still for a save, 30 M parameters",
        "columns": ["saves", "MB", "stands still, s", "before that for the probe, s", "the save takes, s", "saves seen"],
        "rows": [
            [name, middle[background][3] / 1e6, *middle[background][:3], len(seen[background])]
            for name, background in (("in the background", True), ("training waits", False))
        ],
    }
    return table, middle[True][0] / middle[False][0]


if __name__ == "__main__":
    main()
