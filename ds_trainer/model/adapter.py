"""What is trained instead of all weights: small matrices beside a frozen base, or a part of the base itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_trainer.arguments.schema import AdapterSection, FreezeSection, LoraSection
from ds_trainer.errors import ModelError
from ds_trainer.model.quantize import is_held_in_4_bits
from ds_trainer.model.stack import decoder_layers

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Makes sharded parameters whole inside; at the end rank zero's values hold."""


def add_adapter(
    model: Any, adapter: AdapterSection, seed: int, gather: Gather | None = None, *, value_head: bool = False
) -> Any:
    """Decide which weights are trained. Collective where weights are sharded.

    Args:
        model: a transformers model; under ZeRO-3 already sharded.
        adapter: what is asked for.
        seed: new matrices are drawn from it, alike on every rank.
        gather: for sharded weights.
        value_head: the model has one, which is trained whole and kept with the adapter.

    Returns:
        The peft model, or the model itself where it gets no new weights.

    Raises:
        ModelError: a name matches nothing, or the adapter does not fit the model.
    """
    if adapter.freeze is not None:
        freeze(model, adapter.freeze)
        if value_head:
            model.score.requires_grad_(True)
        return model
    from peft import get_peft_model

    config, where = peft_config(adapter, seed, value_head=value_head)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # peft makes a set of a list; a text is all-linear or a regular expression of an existing adapter.
    if not isinstance(config.target_modules, str):
        advice = "" if adapter.ia3 else "; or write all-linear"
        require_matches(where, sorted(config.target_modules), linear, "linear layer", advice)
    lora = adapter.lora
    if lora and lora.modules_to_save:
        modules = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
        require_matches("adapter.lora.modules_to_save", lora.modules_to_save, modules, "module with weights of its own", "")
        require_untied(model, lora.modules_to_save)
        require_whole(model, lora.modules_to_save)
    torch.manual_seed(seed)
    try:
        # The engine holds one type for all weights and fp32 masters beside them.
        built = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from None
    if adapter.oft:
        require_blocks(built, adapter.oft.block_size)
    if lora and lora.path is not None:
        load_adapter(built, Path(lora.path), gather)
    elif lora and lora.init != "zero":
        take_from_base(built, lora.init, gather)
    return built


def peft_config(adapter: AdapterSection, seed: int, *, value_head: bool) -> tuple[Any, str]:
    """What peft is told of an adapter, and the setting that names its layers.

    Raises:
        ModelError: an existing adapter cannot be read.
    """
    from peft import IA3Config, LoraConfig, OFTConfig, TaskType, VeraConfig

    task = TaskType.SEQ_CLS if value_head else TaskType.CAUSAL_LM
    if (lora := adapter.lora) is not None:
        if lora.path is not None:
            config = existing_config(Path(lora.path))
            config.lora_dropout = lora.dropout
            return config, f"{lora.path}/adapter_config.json: target_modules"
        config = LoraConfig(
            task_type=task,
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            modules_to_save=lora.modules_to_save or None,
        )
        return config, "adapter.lora.target_modules"
    if (ia3 := adapter.ia3) is not None:
        config = IA3Config(task_type=task, target_modules=ia3.target_modules, feedforward_modules=ia3.feedforward_modules)
        return config, "adapter.ia3.target_modules"
    if (vera := adapter.vera) is not None:
        config = VeraConfig(
            task_type=task,
            r=vera.rank,
            vera_dropout=vera.dropout,
            target_modules=vera.target_modules,
            projection_prng_key=seed,
        )
        return config, "adapter.vera.target_modules"
    assert adapter.oft is not None  # a constraint of the settings
    config = OFTConfig(task_type=task, oft_block_size=adapter.oft.block_size, target_modules=adapter.oft.target_modules)
    return config, "adapter.oft"


@torch.no_grad()
def take_from_base(model: Any, init: str, gather: Gather | None) -> None:
    """Let the matrices of a new LoRA begin with the main part of each weight, and take that out of the base.

    What they begin with is kept beside them in buffers, and so in checkpoints: `in_place_of` makes the adapter one of the
    untouched base again. Collective where weights are sharded.

    Raises:
        ModelError: the rank is above that of a weight.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight: Any = layer.get_base_layer().weight
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = layer.scaling["default"]
        with gather([weight, first, second]) if gather else nullcontext():
            if len(first) > min(weight.shape):
                raise ModelError(
                    f"adapter.lora.init = {init}: {name} has a weight of {tuple(weight.shape)}, which is of rank "
                    f"{min(weight.shape)} at most. Set adapter.lora.rank to {min(weight.shape)} or less."
                )
            if not weight.is_meta:
                for each, value in zip((first, second), main_part(weight.float(), len(first), init, scale), strict=True):
                    each.copy_(value)
                weight.copy_(weight.float() - scale * (second.float() @ first.float()))
        with gather([first, second]) if gather else nullcontext():  # the same on every rank
            layer.register_buffer("initial_A", first.clone())
            layer.register_buffer("initial_B", second.clone())


def main_part(weight: Tensor, rank: int, init: str, scale: float) -> tuple[Tensor, Tensor]:
    """The two matrices (A, B) a LoRA begins with: (rank, in) and (out, rank).

    `pissa`: the largest singular values s of W = U diag(s) V', as scale * B A = U_r diag(s_r) V_r', found by a randomized
    decomposition. Source: Meng, Wang and Zhang 2024, "PiSSA: principal singular values and singular vectors adaptation".
    `olora`: the first columns of Q and rows of R of W = Q R. Source: Büyükakyüz 2024, "OLoRA: orthonormal
    low-rank adaptation".

    Args:
        weight: (out, in), fp32.
        rank: r, at most min(out, in).
        init: `pissa` or `olora`.
        scale: what LoRA multiplies the product with.
    """
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    u, s, v = torch.svd_lowrank(weight, q=min(rank + _OVERSAMPLED, *weight.shape), niter=_SVD_ITERATIONS)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:, :rank].T, u[:, :rank] * root


_OVERSAMPLED, _SVD_ITERATIONS = 8, 16


def in_place_of(lora: LoraSection) -> LoraSection:
    """The plain LoRA that does on the untouched base what one with `init` does on the changed one.

    W - k B0 A0 + k B A = W + k [B, -B0] [A; A0]: of twice the rank, with the same k.
    """
    alpha = lora.alpha * (math.sqrt(2) if lora.rslora else 2)
    return lora.model_copy(update={"init": "zero", "rank": 2 * lora.rank, "alpha": alpha})


def initial_of(name: str) -> str:
    """The buffer that `take_from_base` keeps of a matrix of LoRA; a name that no buffer has where it is none."""
    return re.sub(r"\.lora_([AB])\.default\.weight$", r".initial_\1", name)


def rank_dim(name: str) -> int:
    """Which dimension of a matrix of LoRA is the rank: A is (rank, in), B is (out, rank)."""
    return 0 if ".lora_A." in name else 1


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
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "orthogonal", "eva"):
        raise ModelError(
            f"adapter.lora.path = {folder}: began with `{config.init_lora_weights}`, which took a part out of its base, so "
            "that it does not fit the base as it is published. Let peft write it for the untouched base: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    config.inference_mode = False
    config.init_lora_weights = True  # they are read
    return config


def refuse_dora(folder: Path) -> None:
    """Refuse to go on from an adapter with DoRA beside weights in 4 bits that ZeRO-3 shards; a constraint says why.

    Raises:
        ModelError: it has DoRA, or cannot be read.
    """
    if existing_config(folder).use_dora:
        raise ModelError(
            f"adapter.lora.path = {folder}: is an adapter with DoRA, which does not train at ZeRO-3 beside weights in 4 bits "
            "(model.quantize). Use --deepspeed ds_configs/zero2.json, or remove model.quantize."
        )


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


def require_blocks(model: Any, block_size: int) -> None:
    """Refuse a size of blocks that peft 0.21 would change (tuners/oft/layer.py, `update_layer`)."""
    for name, layer in model.named_modules():
        taken = getattr(layer, "oft_block_size", {}).get("default", block_size)
        if taken != block_size:
            raise ModelError(
                f"adapter.oft.block_size = {block_size} does not divide the {layer.in_features} inputs of {name}. "
                f"Write {taken}, if it divides those of all layers, or choose layers with adapter.oft.target_modules."
            )


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


def require_whole(model: Any, modules_to_save: Iterable[str]) -> None:
    """Refuse to train weights that are held in 4 bits."""
    for name, module in model.named_modules():
        if any(name == each or name.endswith(f".{each}") for each in modules_to_save) and any(
            is_held_in_4_bits(weight) for weight in module.parameters(recurse=False)
        ):
            raise ModelError(
                f"adapter.lora.modules_to_save: {name} is held in 4 bits (model.quantize), and cannot be trained itself. "
                "Name modules that are not, such as embed_tokens, or let LoRA train beside it."
            )


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
