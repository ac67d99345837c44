"""What can happen to the files of a checkpoint on a disk: what test_corruption.py and scripts/bench/corruption.py share."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from forks import Command, Forks
from helpers import write_corpus, write_run

from ds_trainer.checkpoint import layout, manager

NEWEST, OLDER = layout.checkpoint_name(6), layout.checkpoint_name(4)
FILES = ("manifest.json", "rank_00000.safetensors", "rank_00001.safetensors")


def make_checkpoints(folder: Path, forks: Forks, deepspeed: dict) -> Path:
    """Train on two ranks, and give the folder with the checkpoints of steps 4 and 6."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    write_corpus(corpus)
    config = write_run(corpus, folder, train={"max_steps": 6}, checkpoint={"every_steps": 2}, deepspeed=deepspeed)
    shown = forks.run(Command(["train", "--config", str(config)], ranks=2))
    assert shown.codes == [0, 0], shown.text
    return folder / "run" / "checkpoints"


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(path: Path, seed: int) -> None:
    drawn = random.Random(f"{path.name} {seed}")
    content = bytearray(path.read_bytes())
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    path.write_bytes(content)


def damages(flips: int, seed: int) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """What can be done to the newest checkpoint: (kind, file, what does it to the folder of checkpoints)."""
    for name in FILES:
        found: list[tuple[str, Callable[[Path], object]]] = [
            ("emptied", partial(truncate, share=0.0)),
            ("cut in half", partial(truncate, share=0.5)),
            ("deleted", Path.unlink),
            ("that of another step", lambda path, name=name: shutil.copyfile(path.parent.parent / OLDER / name, path)),
            *[("one bit flipped", partial(flip, seed=seed + number)) for number in range(flips)],
        ]
        if name != "manifest.json":
            other = FILES[3 - FILES.index(name)]
            found.append(("that of another rank", lambda path, other=other: shutil.copyfile(path.parent / other, path)))
        for kind, damage in found:
            yield kind, name, lambda folder, damage=damage, name=name: damage(folder / NEWEST / name)


def spoiled_pointers() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """What can be done to `latest`, which is for DeepSpeed's tools: a start does not read it."""
    yield "missing", "latest", lambda folder: (folder / "latest").unlink()
    yield "empty", "latest", lambda folder: (folder / "latest").write_text("")
    yield "wrong", "latest", lambda folder: (folder / "latest").write_text("step_00000099")


def taken_after(damage: Callable[[Path], object], checkpoints: Path, scratch: Path) -> tuple[str | None, list[str]]:
    """Damage a copy of some checkpoints, and give the name of the one that a start takes, and what it says."""
    copy = scratch / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoints, copy)
    damage(copy)
    told: list[str] = []
    found = manager.find(copy, "auto", told.append, was_saved=True)
    return found.path.name if found else None, told
