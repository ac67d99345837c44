"""What is trained instead of all weights: small matrices beside a frozen base, or a part of the base itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_trainer.arguments.schema import AdapterSection, FreezeSection, LoraSection
from ds_trainer.errors import ModelError
from ds_trainer.model.stack import decoder_layers

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Makes sharded parameters whole inside; at the end rank zero's values hold."""


def add_adapter(model: Any, adapter: AdapterSection, seed: int, gather: Gather | None = None) -> Any:
    """Decide which weights are trained. Collective where weights are sharded.

    Args:
        model: a transformers model; under ZeRO-3 already sharded.
        adapter: what is asked for.
        seed: new matrices are drawn from it, alike on every rank.
        gather: for sharded weights.

    Returns:
        The peft model, or the model itself where it gets no new weights.

    Raises:
        ModelError: a name matches nothing, or the adapter does not fit the model.
    """
    if adapter.freeze is not None:
        freeze(model, adapter.freeze)
        return model
    assert adapter.lora is not None  # a constraint of the settings
    return add_lora(model, adapter.lora, seed, gather)


def add_lora(model: Any, lora: LoraSection, seed: int, gather: Gather | None = None) -> Any:
    """Freeze the model and put LoRA matrices beside its linear layers; see `add_adapter`."""
    from peft import LoraConfig, TaskType, get_peft_model

    if lora.path is not None:
        config: Any = existing_config(Path(lora.path))
        config.lora_dropout = lora.dropout
    else:
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            modules_to_save=lora.modules_to_save or None,
        )
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    where = "adapter.lora.target_modules" if lora.path is None else f"{lora.path}/adapter_config.json: target_modules"
    # peft makes a set of a list; a text is all-linear or a regular expression of an existing adapter.
    if not isinstance(config.target_modules, str):
        require_matches(where, sorted(config.target_modules), linear, "linear layer", "; or write all-linear")
    if config.modules_to_save:
        modules = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
        require_matches("adapter.lora.modules_to_save", config.modules_to_save, modules, "module with weights of its own", "")
        require_untied(model, config.modules_to_save)
    torch.manual_seed(seed)
    try:
        # The engine holds one type for all weights and fp32 masters beside them.
        built = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from None
    if lora.path is not None:
        load_adapter(built, Path(lora.path), gather)
    return built


def existing_config(folder: Path) -> Any:
    """The config of an adapter on the disk.

    Raises:
        ModelError: there is none, or it is no LoRA of the base's own weights.
    """
    from peft import LoraConfig, PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"adapter.lora.path = {folder}: has no adapter_config.json. Name a folder that peft or `export` wrote."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"adapter.lora.path = {folder}: its adapter_config.json cannot be read ({error}).") from None
    if not isinstance(config, LoraConfig):
        raise ModelError(f"adapter.lora.path = {folder}: is an adapter of type {config.peft_type.value}, not LoRA.")
    config.inference_mode = False
    config.init_lora_weights = True  # they are read; others would change the base
    return config


@torch.no_grad()
def load_adapter(model: Any, folder: Path, gather: Gather | None) -> None:
    """Fill the adapter of a peft model from a folder. Collective where weights are sharded.

    Raises:
        ModelError: the weights are not there, or are not those of this model.
    """
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    try:
        reader = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"adapter.lora.path: {file} cannot be read ({error}). Only safetensors are read.") from None
    there = set(reader.keys())
    wanted = {name_in_file(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if odd := sorted(there ^ wanted.keys()):
        whose = "this model has no place for" if odd[0] in there else "does not hold"
        raise ModelError(f"adapter.lora.path: {file}: {whose} {odd[0]}. Was it trained on another base model?")
    for name, parameter in wanted.items():
        with gather([parameter]) if gather else nullcontext():
            value = reader.get_tensor(name)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if tuple(value.shape) != shape:
                raise ModelError(f"adapter.lora.path: {file}: {name} is {tuple(value.shape)}, and this model needs {shape}.")
            if parameter.numel():
                parameter.copy_(value)


def name_in_file(name: str) -> str:
    """What a peft folder calls a weight of the adapter "default".

    Source: peft 0.21, utils/save_and_load.py, get_peft_model_state_dict.
    """
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def freeze(model: Any, wanted: FreezeSection) -> None:
    """Let only the chosen weights of a model be trained.

    Raises:
        ModelError: a pattern matches no weight, or the model has fewer layers.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for pattern in wanted.train:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ModelError(
                f"adapter.freeze.train: {pattern} matches no weight of this model. Its weights have names such as "
                f"{names[0]}, {names[len(names) // 2]}, {names[-1]}."
            )
        chosen.update(matched)
    if wanted.last_layers is not None:
        found = decoder_layers(model)
        count = 0 if found is None else len(found[2])
        if found is None or wanted.last_layers > count:
            raise ModelError(f"adapter.freeze.last_layers = {wanted.last_layers}: this model has {count} layers.")
        last = {id(parameter) for layer in found[2][count - wanted.last_layers :] for parameter in layer.parameters()}
        chosen.update(name for name, parameter in model.named_parameters() if id(parameter) in last)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def require_matches(where: str, wanted: Iterable[str], names: list[str], kind: str, advice: str) -> None:
    """Refuse names (or ends of names) that are those of no module."""
    unmatched = [each for each in wanted if not any(name == each or name.endswith(f".{each}") for name in names)]
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ModelError(f"{where}: {', '.join(unmatched)} matches no {kind} of this model. It has {', '.join(known)}{advice}.")


def require_untied(model: Any, modules_to_save: Iterable[str]) -> None:
    """Refuse to train a copy of one of two modules that share their weight: afterwards they would not."""
    shared = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    ends = {each.rpartition(".")[2] for each in modules_to_save} & {"embed_tokens", "wte", "embed_in", "lm_head", "embed_out"}
    if shared and ends:
        raise ModelError(
            f"adapter.lora.modules_to_save: {', '.join(sorted(ends))} shares its weight with the "
            "other end of this model (tie_word_embeddings), and a trained copy would not. Leave it out."
        )


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
