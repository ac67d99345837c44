"""The reference's log-probabilities of all the data, computed once before the first step and kept beside the tokens.

Before anything is resumed or trained, the engine holds the weights that the run begins with: it is the reference. So no second
model is built for it, and none is computed with in a step.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds_trainer import comm, whereabouts
from ds_trainer.arguments.objective import reference_is_base, reference_kind
from ds_trainer.assemble import Prepared
from ds_trainer.data.cache import describe_file, fingerprint
from ds_trainer.data.order import positions_of_window
from ds_trainer.data.rows import TokenRows
from ds_trainer.data.sources import Report
from ds_trainer.data.store import RandomFile, TokenStore
from ds_trainer.engine.wrapper import Engine
from ds_trainer.errors import DataError, ModelError
from ds_trainer.model import attention, load
from ds_trainer.objectives.reference import SUMS, adapter_off, log_probs_of_answers
from ds_trainer.protocols import ModelBatch
from ds_trainer.recovery import config_digest
from ds_trainer.run_data import cache_folder_of

VERSION = 1
"""Raise it when the same data and weights give other numbers."""
_SAY_SECONDS = 10.0
Values = dict[str, NDArray[np.float64]]
"""Of each store, by the name of its folder: (num_documents,); NaN where no row has the document."""


def attach_reference(prepared: Prepared, engine: Engine, report: Report) -> None:
    """Have the rows tell the reference's log-probabilities, where the run wants that; compute what no file has. Collective.

    Args:
        prepared: of the run.
        engine: with the weights that the run begins with: before it is resumed.
        report: takes a line for the user.

    Raises:
        ModelError: the reference computes numbers that are not finite.
        DataError: a file cannot be written, or holds numbers that this model does not compute.
    """
    settings, data = prepared.resolved.settings, prepared.data
    if reference_kind(settings) != "precomputed":
        return
    key = comm.from_rank_zero(identity(prepared) if comm.rank() == 0 else {})  # it reads the files of the weights
    held_out = {f"the held-out set {name}" if name else "the held-out data": rows for name, rows in data.held_out.items()}
    assert data.rows  # pairs are not streamed
    for name, rows in ({"the training data": data.rows} | held_out).items():
        files = {store: reference_file(prepared, key, rows, store) for store in rows.stores}
        names = ", ".join(sorted({str(path) for path in files.values()}))
        missing = comm.largest(int(not all(has_all(path, store) for store, path in files.items())))
        if missing:
            report(f"reference: computing its log-probabilities of {name}, {rows.num_rows:,} rows, once and for all starts")
            values = compute(prepared, engine, rows, report)
            for store, path in files.items():
                if comm.rank() == 0:
                    write(path, values[store.folder.name])
                comm.wait_for_all()
                if not has_all(path, store):  # on a host that does not see the disk of rank zero
                    write(path, values[store.folder.name])
        for store, path in files.items():
            store.numbers[SUMS] = RandomFile(path)
        if not missing:
            require_same(prepared, engine, rows, names)
        report(f"reference: its log-probabilities of {name} are in {names}; no step computes with it")


def identity(prepared: Prepared) -> dict[str, Any]:
    """What tells the model before the run, and how it computes, from others."""
    settings = prepared.resolved.settings
    model, lora = settings.model, settings.lora
    files = load.weight_files(model.path) if model.path else []
    hub = None if files or model.path is None else [model.path, getattr(prepared.model_config, "_commit_hash", None)]
    if lora and lora.path:
        files = [*files, *sorted(Path(lora.path).glob("*.safetensors"))]
    drawn = model.path is None or model.resize_vocabulary
    return {
        "version": VERSION,
        "config": config_digest(prepared.model_config),
        "files": [describe_file(path)["sha256"] for path in files],
        "hub": hub,
        "seed": settings.train.seed if drawn else None,
        "precision": settings.train.precision,
        "quantize": model.quantize,
        "attention": prepared.attention,
    }


def reference_file(prepared: Prepared, key: Mapping[str, Any], rows: TokenRows, store: TokenStore) -> Path:
    """Where the numbers of a store's documents are kept: beside the tokens, named by everything that decides them."""
    parts = {**key, "seq_len": rows.seq_len, "tokens": store.folder.name}
    return cache_folder_of(prepared.resolved.settings) / f"reference_{fingerprint(parts)}.bin"


def compute(prepared: Prepared, engine: Engine, rows: TokenRows, report: Report) -> Values:
    """What the reference makes of every document of all rows, shared out among the ranks. Collective."""
    values = {store.folder.name: np.zeros(store.num_documents) for store in rows.stores}
    seen = {name: np.zeros(len(each)) for name, each in values.items()}
    batches = -(-rows.num_rows // (prepared.batch.micro_batch_size * engine.data_parallel_size))
    begun = said = time.monotonic()
    for done, own in enumerate(shared_out(prepared, engine, rows, batches), start=1):
        whereabouts.at("computing the reference")
        sums = sums_of(prepared, engine, read(prepared, rows, own)).tolist()
        documents = [sample for position in own if position is not None for sample in rows.samples(position)]
        for (store, document), value in zip(documents, sums, strict=True):
            values[store.folder.name][document], seen[store.folder.name][document] = value, 1.0
        if (now := time.monotonic()) - said > _SAY_SECONDS:
            said, share = now, done / batches
            report(f"reference: {share:.0%}, {(now - begun) * (1 - share) / share:,.0f} s left")
    for name in sorted(values):
        total, count = (comm.sum_over_ranks(torch.from_numpy(each[name]).to(engine.device)).cpu() for each in (values, seen))
        if not bool(torch.isfinite(total).all()):
            raise ModelError(
                "the reference, which is the model before the run, gives log-probabilities that are not finite. Is model.path "
                "damaged, or train.precision too narrow for it?"
            )
        values[name] = (total / count).numpy()  # a document of two pools is in rows of both; NaN where it is in none
    return values


def require_same(prepared: Prepared, engine: Engine, rows: TokenRows, names: str) -> None:
    """Refuse numbers that an earlier start kept and this model does not compute: a micro-batch a rank tells. Collective.

    Raises:
        DataError: with how far they are off.
    """
    (own,) = shared_out(prepared, engine, rows, 1)
    batch = read(prepared, rows, own)
    found, kept = sums_of(prepared, engine, batch).cpu(), batch.numbers[SUMS]
    off = float(((found - kept).abs() / (1 + kept.abs())).max()) if len(kept) else 0.0
    worst = max(comm.gather_objects(math.inf if math.isnan(off) else off))
    if worst > (1e-3 if prepared.resolved.settings.train.precision == "fp32" else 5e-2):
        raise DataError(
            f"{names}: the reference's log-probabilities that an earlier start kept are not those of this model (off by "
            f"{worst:.1e} of their size). Remove the file, and the same command computes them anew."
        )


def shared_out(prepared: Prepared, engine: Engine, rows: TokenRows, batches: int) -> list[list[int | None]]:
    """The rows that this rank reads in each of so many micro-batches, from the first row on; None is the empty row."""
    positions = positions_of_window(
        0,
        micro_batch_size=prepared.batch.micro_batch_size,
        gradient_accumulation_steps=batches,
        rank=comm.rank(),
        data_parallel_size=engine.data_parallel_size,
    )
    return [[each if each < rows.num_rows else None for each in some] for some in positions]


def read(prepared: Prepared, rows: TokenRows, own: list[int | None]) -> ModelBatch:
    """Rows as the model takes them: all documents at once, whatever they are compared with."""
    return attention.arrange(replace(rows.read(own), kinds=None), prepared.attention)


def sums_of(prepared: Prepared, engine: Engine, batch: ModelBatch) -> Tensor:
    """What the model before the run makes of each document of a batch. Collective under ZeRO-3."""
    base = reference_is_base(prepared.resolved.settings.adapter)
    return engine.look_at(adapter_off if base else log_probs_of_answers, batch)


def has_all(path: Path, store: TokenStore) -> bool:
    """Whether a file has a number for each document of a store."""
    try:
        return path.stat().st_size == 8 * store.num_documents
    except OSError:
        return False


def write(path: Path, values: NDArray[np.float64]) -> None:
    """Write numbers so that the file is there whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(values.astype("<f8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{path}: the reference's log-probabilities cannot be written: {error.strerror}. Set data.cache_folder to a folder "
            "with room and write permission."
        ) from None
