"""The story of an export: a checkpoint of any stage becomes a Hugging Face folder, and proves that it computes the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ds_trainer.arguments.constraints import DTYPES
from ds_trainer.arguments.objective import PAIR_STAGES
from ds_trainer.arguments.schema import RunSettings
from ds_trainer.checkpoint import layout, manager
from ds_trainer.checkpoint.keep import from_best_on
from ds_trainer.checkpoint.manager import Found
from ds_trainer.checkpoint.saver import kept
from ds_trainer.checkpoint.slices import SliceReader
from ds_trainer.data.loader import evaluation_batches
from ds_trainer.data.prepare import prepare_rows
from ds_trainer.data.render import effective_chat_template
from ds_trainer.errors import CheckpointError, ModelError, RefusedError
from ds_trainer.model import attention, load, quantize
from ds_trainer.model.adapter import add_adapter, in_place_of, initial_of, rank_dim
from ds_trainer.model.tokenizer import load_tokenizer
from ds_trainer.objectives.chunked_head import plain_log_probs, plain_nll_sum
from ds_trainer.objectives.pairs import chosen_and_rejected, sums_of_sequences
from ds_trainer.protocols import MicroBatch
from ds_trainer.run_data import cache_folder_of

Report = Callable[[str], None]

PART_BYTES = 2 << 30
"""The size of one file of an export at most, and so of what is held in memory, where a single weight is not larger."""
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""How far the loss of the reloaded model may be from the training engine's, relative to it, by the export's precision."""


def export(run: Path, to: Path, *, checkpoint: str | None, merge: bool, precision: str | None, report: Report) -> None:
    """Write the model of a checkpoint as a Hugging Face folder, reload it, and compare its loss with the training engine's.

    Args:
        run: the run folder.
        to: the folder to write; it must not exist.
        checkpoint: which one, or "best"; by default the newest that is complete.
        merge: write base and adapter as one model instead of an adapter folder.
        precision: `fp32`, `bf16` or `fp16`; by default that of the run.
        report: takes a line for the user.

    Raises:
        RefusedError: no such run or checkpoint, or the folder exists.
        CheckpointError: the reloaded model does not compute what the training engine did; nothing is left at `to`.
    """
    found = choose(run, checkpoint, report)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RefusedError(f"--to {to}: exists and is not empty. Remove it, or write for example --to {to}-2.")
    settings = RunSettings.model_validate(found.manifest["settings"])
    beside = settings.adapter is not None and settings.adapter.beside is not None
    if merge and not beside:
        raise RefusedError(f"{run} trained the model's own weights: there is no adapter to merge. Leave --merge out.")
    if settings.model.quantize:
        quantize.require_library()
    precision = precision or settings.train.precision
    partial = to.parent / f".partial-{to.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise RefusedError(f"--to {to}: cannot be written ({error.strerror}). Name a folder you can write to.") from None
    report(f"exporting {found.path} (step {found.manifest['step']}) in {precision}")
    try:
        tokenizer = load_tokenizer(settings.model)
        batches = batches_of_probe(found, settings, tokenizer)
        if settings.adapter is None and not load.has_converted_weights(settings.model):
            write_in_parts(found, settings, tokenizer, partial, precision)
        else:
            model = rebuild(found, settings, tokenizer)
            if settings.model.quantize:
                report(lost_in_4_bits(model, batches, settings, merge=merge))
            if merge:
                model = model.merge_and_unload()
            write(model.to(getattr(torch, DTYPES[precision])), settings, partial, precision)
            del model
        write_tokenizer(tokenizer, settings, partial)
        reloaded = reload(partial, settings, adapter=beside and not merge, precision=precision)
        verify(reloaded, batches, found, settings, precision, report)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"--to {to}: could not be written ({error.strerror}: {error.filename}).") from None
        raise
    if to.exists():
        to.rmdir()
    partial.rename(to)
    kind = "adapter" if beside and not merge else "model"
    rows = found.manifest["probe"]["rows"]
    what = "its loss" if settings.train.stage not in PAIR_STAGES else "what it makes of the answers"
    report(f"the {kind} is in {to}; {what} on {rows} rows agrees with the training engine's")


def choose(run: Path, checkpoint: str | None, report: Report) -> Found:
    """Find the checkpoint to export, by name or the newest one.

    Raises:
        RefusedError: the run or the checkpoint does not exist.
    """
    folder = run / "checkpoints"
    complete = layout.complete_checkpoints(folder)
    if not complete:
        raise RefusedError(
            f"--run {run}: holds no complete checkpoint ({folder.absolute()}). "
            "Name the folder that checkpoint.folder of the run file says."
        )
    if checkpoint == "best":
        judged = from_best_on(kept(folder))
        if not judged:
            raise RefusedError(f"--checkpoint best: nothing was evaluated in {run}. Name one, such as {complete[-1].name}.")
        checkpoint = layout.checkpoint_name(judged[0].step)
    names = ", ".join(path.name for path in complete)
    if checkpoint is not None and checkpoint not in [path.name for path in complete]:
        raise RefusedError(f"--checkpoint {checkpoint}: no such checkpoint in {folder}. There are {names}.")
    found = manager.find(folder, str(folder / checkpoint) if checkpoint else "auto", report, was_saved=True)
    assert found is not None  # was_saved makes an unusable folder an error
    return found


def write_in_parts(found: Found, settings: RunSettings, tokenizer: Any, folder: Path, precision: str) -> None:
    """Write config and weights, never more of these in memory than one file holds.

    Raises:
        ModelError: weights are missing in the checkpoint, or do not fit.
    """
    from safetensors.torch import save_file

    dtype = getattr(torch, DTYPES[precision])
    with torch.device("meta"):
        model = empty_model(settings, tokenizer, precision)
    reader = found.slices()
    wanted = {name: value.shape for name, value in model.named_parameters()}  # tied ones once
    require_weights(reader, wanted, found)
    parts: list[list[str]] = [[]]
    for name in wanted:
        if parts[-1] and sum(wanted[each].numel() for each in [*parts[-1], name]) * dtype.itemsize > PART_BYTES:
            parts.append([])
        parts[-1].append(name)
    buffers = {name: value for name, value in model.named_buffers() if reader.numel(name, "buffer") is not None}
    index: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = torch.empty(wanted[name], dtype=dtype)
            reader.read(name, "fp32", 0, tensors[name].view(-1))
        for name, value in buffers.items() if number == 1 else ():
            tensors[name] = torch.empty(value.shape, dtype=value.dtype)
            reader.read(name, "buffer", 0, tensors[name].view(-1))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if len(parts) > 1:
        total = sum(shape.numel() for shape in wanted.values()) * dtype.itemsize
        fields = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    model.config.dtype = DTYPES[precision]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def empty_model(settings: RunSettings, tokenizer: Any, precision: str) -> Any:
    """The model as it was trained, with its vocabulary grown, before any weight is in it."""
    model: Any = load.build_model(
        load.load_config(settings.model),
        precision=precision,
        attention="sdpa",
        trust_remote_code=settings.model.trust_remote_code,
        value_head=has_value_head(settings),
    )
    grow_vocabulary(model, settings, tokenizer)
    model.config.use_cache = True
    return model


def has_value_head(settings: RunSettings) -> bool:
    """Whether what was trained gives a value and not words."""
    return settings.train.stage == "reward"


def grow_vocabulary(model: Any, settings: RunSettings, tokenizer: Any) -> None:
    """Give a model the vocabulary it was trained with, and the padding that its value head knows."""
    load.finish_model(
        model,
        tokens=len(tokenizer),
        resize=settings.model.resize_vocabulary,
        gradient_checkpointing=False,
        seed=settings.train.seed,
    )
    if has_value_head(settings):
        load.mark_padding(model, tokenizer.pad_token_id)


def require_weights(reader: SliceReader, wanted: Mapping[str, torch.Size], found: Found) -> None:
    """Refuse a checkpoint that does not hold every weight in its size."""
    if misfits := [name for name, shape in wanted.items() if reader.numel(name, "fp32") != shape.numel()]:
        raise ModelError(
            f"{found.path}: {len(misfits)} trained weights are missing or of another size, for example {misfits[0]}."
        )


def rebuild(found: Found, settings: RunSettings, tokenizer: Any) -> Any:
    """The trained model on the CPU in fp32, every weight from the checkpoint or the frozen base, which is not in 4 bits here.

    Raises:
        ModelError: weights are missing in the checkpoint, or do not fit.
    """
    if settings.adapter is None:
        model = empty_model(settings, tokenizer, "fp32")
    else:
        config = load.load_config(settings.model)
        new_head = partial(load.initialize_value_head, seed=settings.train.seed) if has_value_head(settings) else None
        plain = settings.model.model_copy(update={"quantize": None})
        model = load.load_pretrained(plain, config, precision="fp32", attention="sdpa", new_head=new_head)
        if settings.model.quantize:
            quantize.mark(model)
        grow_vocabulary(model, settings, tokenizer)
        adapter = settings.adapter
        if settings.lora is not None and settings.lora.init != "zero":
            adapter = adapter.model_copy(update={"lora": in_place_of(settings.lora)})
        model = add_adapter(model, adapter, settings.train.seed, value_head=has_value_head(settings))
    reader = found.slices()
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    doubled = [name for name in wanted if reader.numel(initial_of(name), "buffer") is not None]
    shapes = {
        name: parameter.chunk(2, dim=rank_dim(name))[0].shape if name in doubled else parameter.shape
        for name, parameter in wanted.items()
    }
    require_weights(reader, shapes, found)
    with torch.no_grad():
        for name, parameter in wanted.items():
            value = torch.empty(shapes[name])
            reader.read(name, "fp32", 0, value.view(-1))
            if name in doubled:
                initial = torch.empty(shapes[name])
                reader.read(initial_of(name), "buffer", 0, initial.view(-1))
                value = torch.cat([value, initial if rank_dim(name) == 0 else -initial], dim=rank_dim(name))
            parameter.copy_(value)
        for name, value in model.named_buffers():
            reader.read(name, "buffer", 0, value.view(-1))
    model.config.use_cache = True
    return model.eval()


def lost_in_4_bits(model: Any, batches: list[MicroBatch], settings: RunSettings, *, merge: bool) -> str:
    """Round the base of a rebuilt model to what the run held in 4 bits; returns what that changes, for the user."""
    kind, path = settings.model.quantize, settings.model.path
    before, _ = measured(model, batches, settings)
    off = quantize.round_to_4_bits(model, settings.train.precision)
    after, _ = measured(model, batches, settings)
    numbers = ", ".join(f"{name} {after[name]:.6f} instead of {before[name]:.6f} beside it as it is" for name in before)
    then = (
        f"The merged model keeps the values of {kind}: what they lost is lost."
        if merge
        else f"Load the adapter beside the base in {kind} for that (docs/adapters.md, QLoRA)."
    )
    return (
        f"base: in {kind} its linear layers are {off:.1%} off {path} (root mean square, of their size), and the adapter was "
        f"trained beside these: {numbers}. {then}"
    )


def write(model: Any, settings: RunSettings, folder: Path, precision: str) -> None:
    """Write the weights and config of a model that is whole in memory."""
    if hasattr(model, "peft_config"):
        # Written relative to this folder, a path would be looked for on the hub from any other.
        base = Path(str(settings.model.path))
        if base.is_dir():
            model.peft_config["default"].base_model_name_or_path = str(base.absolute())
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        model.config.dtype = DTYPES[precision]
        model.save_pretrained(folder)


def write_tokenizer(tokenizer: Any, settings: RunSettings, folder: Path) -> None:
    """Write the tokenizer, with the chat template that was trained on."""
    if settings.train.stage != "pretrain":
        tokenizer.chat_template = effective_chat_template(tokenizer, settings.data.chat_template)
    tokenizer.save_pretrained(folder)


def reload(folder: Path, settings: RunSettings, *, adapter: bool, precision: str) -> Any:
    """Load what was written as any user of transformers would."""
    kind = load.auto_class(value_head=has_value_head(settings))
    options: dict[str, Any] = {
        "dtype": getattr(torch, DTYPES[precision]),
        "trust_remote_code": settings.model.trust_remote_code,
    }
    if not adapter:
        return kind.from_pretrained(folder, **options)
    from peft import PeftModel

    if has_value_head(settings):
        options["num_labels"] = 1
    if settings.model.quantize:
        options["dtype"] = getattr(torch, DTYPES[settings.train.precision])
        options["quantization_config"] = quantize.how_to_hold(settings.train.precision)
    base = kind.from_pretrained(settings.model.path, revision=settings.model.revision, **options)
    if settings.model.quantize:
        quantize.multiply_here(base)  # its own product computes in bf16 on some CPUs, whatever the type
    return PeftModel.from_pretrained(base, str(folder))


def verify(model: Any, batches: list[MicroBatch], found: Found, settings: RunSettings, precision: str, report: Report) -> None:
    """Compare what the reloaded model computes with what the training engine wrote into the checkpoint.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    probe = found.manifest["probe"]
    found_now, count = measured(model, batches, settings)
    expected = {name: probe["loss"] if name == "loss" else probe["metrics"][name] for name in found_now}
    for name, ours in found_now.items():
        theirs = f"{expected[name]:.6f} in the training engine"
        report(f"{name} on {probe['rows']} rows: {theirs}, {ours:.6f} reloaded with transformers")
    if count != probe["num_targets"]:
        report(f"not compared: the data has changed since the checkpoint ({probe['num_targets']} targets then, {count} now)")
        return
    # A value may lie anywhere around zero: it is compared on the scale of both, which is 0.01 at least.
    scale = max(0.0 if "loss" in expected else 0.01, *map(abs, expected.values()))
    for name, ours in found_now.items():
        if not abs(ours - expected[name]) <= TOLERANCE[precision] * scale:
            raise CheckpointError(
                f"the exported model computes a {name} of {ours:.6f} where the training engine computed {expected[name]:.6f}. "
                "Nothing was kept. Was the base model or a file of the checkpoint changed?"
            )


def batches_of_probe(found: Found, settings: RunSettings, tokenizer: Any) -> list[MicroBatch]:
    """The rows whose loss is kept in a checkpoint, one a batch."""
    rows = prepare_rows(
        settings.data,
        settings.probe_sources,
        settings.train.stage,
        tokenizer,
        seq_len=settings.data.seq_len,
        cache_folder=cache_folder_of(settings),
        report=lambda line: None,
    )
    max_rows = found.manifest["probe"]["rows"]
    return list(evaluation_batches(rows, micro_batch_size=1, rank=0, data_parallel_size=1, max_rows=max_rows))


def measured(model: Any, batches: list[MicroBatch], settings: RunSettings) -> tuple[dict[str, float], int]:
    """The loss of a model, or what it makes of the answers, by name; and the number of targets."""
    if settings.train.stage not in PAIR_STAGES:
        losses = [plain_loss(model, batch) for batch in batches]
        count = sum(targets for _, targets in losses)
        return {"loss": sum(nll for nll, _ in losses) / count}, count
    prefix, measure = ("rewards", plain_values) if has_value_head(settings) else ("logps", plain_log_probs_of_answers)
    answers = torch.cat([measure(model, batch) for batch in batches])
    arranged = [attention.arrange(batch, "sdpa") for batch in batches]
    if settings.train.stage == "kto":
        wanted = torch.cat([each.wanted for each in arranged if each.wanted is not None])
        parts = answers[wanted], answers[~wanted]
    else:
        parts = chosen_and_rejected(answers)
    names = (f"{prefix}/{which}" for which in ("chosen", "rejected"))
    found = {name: float(each.mean()) for name, each in zip(names, parts, strict=True) if len(each)}
    return found, sum(each.num_targets for each in arranged)


@torch.no_grad()
def plain_loss(model: Any, batch: MicroBatch) -> tuple[float, int]:
    """Sum of the loss over a batch's targets and their number, through the logits of an ordinary model."""
    arranged = attention.arrange(batch, "sdpa")
    logits = model(**arranged.inputs).logits.flatten(0, 1)
    return float(plain_nll_sum(logits[arranged.target_positions], arranged.targets)), arranged.num_targets


@torch.no_grad()
def plain_log_probs_of_answers(model: Any, batch: MicroBatch) -> torch.Tensor:
    """The log-probability of each answer of a batch, (num_sequences,), through the logits of an ordinary model."""
    arranged = attention.arrange(batch, "sdpa")
    logits = model(**arranged.inputs).logits.flatten(0, 1)
    return sums_of_sequences(plain_log_probs(logits[arranged.target_positions], arranged.targets), arranged)


@torch.no_grad()
def plain_values(model: Any, batch: MicroBatch) -> torch.Tensor:
    """The value of each answer of a batch, (num_sequences,): each fed alone, as a user of the model does."""
    values = []
    for ids, positions, is_token in zip(batch.input_ids, batch.position_ids, batch.is_token, strict=True):
        length = int(is_token.sum())
        starts = (positions[:length] == 0).nonzero().flatten().tolist()
        for begin, end in pairwise([*starts, length]):
            values.append(model(input_ids=ids[None, begin:end]).logits[0, 0].float())
    return torch.stack(values)
