"""How much glibc's heap grows under a forward and backward pass, beside its replay in `ds_trainer/plan/heap.py`.

One process, no DeepSpeed, the model of the "67 M" rows of plan_accuracy.py, one row of 1024 positions in documents of 70; three
passes, as the heap of the first is still warm. What the heap took (mallinfo2) over what it held before: its holes count. Here
the one measured figure of the replay comes from: of how many blocks one leaves a splinter that separates holes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from typing import Any

import torch
from plan_accuracy import MODELS

from ds_trainer.arguments.schema import ModelSection
from ds_trainer.model import load
from ds_trainer.model.attention import DOCUMENTS, register_document_attention
from ds_trainer.objectives import language_model
from ds_trainer.plan.shape import Traced, trace
from ds_trainer.protocols import ModelBatch

POSITIONS, DOCUMENT, PASSES = 1024, 70, 3
MIB = 1 << 20


class _Mallinfo(ctypes.Structure):
    """Source: mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpointing", action="store_true")
    checkpointing = parser.parse_args().checkpointing
    section = ModelSection.model_validate({"config": MODELS["67 M"], "tokenizer": "x"})
    found = [round(grown / MIB) for grown in real_growth(section, checkpointing)]
    replayed = trace(
        Traced(
            model=section.model_dump_json(),
            adapter="null",
            precision="fp32",
            attention=DOCUMENTS,
            gradient_checkpointing=checkpointing,
            rows=1,
            seq_len=POSITIONS,
            whole_layers=False,
            keep_gradients=False,
            on_cpu=True,
        )
    ).small
    print(f"MiB: {replayed / MIB:.0f} replayed; grown by the end of each pass: {found}")


def real_growth(section: ModelSection, checkpointing: bool) -> list[float]:
    """The most by which the heap grew up to the end of each pass, without what the first left allocated, in bytes."""
    register_document_attention()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    libc.mallopt(-3, 32 * MIB)  # M_MMAP_THRESHOLD, as engine/build.py leaves it
    model: Any = load.build_model(load.load_config(section), precision="fp32", attention=DOCUMENTS, trust_remote_code=False)
    load.finish_model(model, tokens=0, resize=False, gradient_checkpointing=checkpointing, seed=0)
    language_model.attach(model, chunked=True)
    lengths = [DOCUMENT] * (POSITIONS // DOCUMENT) + [POSITIONS % DOCUMENT]
    ids = torch.randint(0, 3000, (1, POSITIONS))
    batch = ModelBatch(
        inputs={
            "input_ids": ids,
            "position_ids": torch.cat([torch.arange(each) for each in lengths])[None],
            "use_cache": False,
            "document_lengths": tuple(lengths),
        },
        target_positions=torch.arange(POSITIONS),
        targets=ids[0],
        num_tokens=POSITIONS,
    )
    gc.collect()
    libc.malloc_trim(0)
    before = libc.mallinfo2()
    most, grown = 0, []

    def note(*_: object) -> None:
        nonlocal most
        most = max(most, libc.mallinfo2().arena - before.arena)

    def drop(parameter: torch.Tensor) -> None:
        note()
        parameter.grad = None

    for module in model.modules():
        module.register_forward_hook(note)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)
    for _ in range(PASSES):
        language_model.nll_sum(model, batch).backward()
        # What stays allocated (buffers of the matrix library) is no activation.
        grown.append(most - (libc.mallinfo2().uordblks - before.uordblks))
    return grown


if __name__ == "__main__":
    main()
