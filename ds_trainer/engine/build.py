"""Build the DeepSpeed engine: sharded construction, the ops it needs, `deepspeed.initialize`.

Written for DeepSpeed 0.19.6 to 0.20. What depends on the version is said where it is used.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ds_trainer.arguments.engine_config import OptimizerKind
from ds_trainer.arguments.schema import TrainSection
from ds_trainer.engine.offload import build_op
from ds_trainer.engine.optim import build_optimizer, build_schedule, parameter_groups
from ds_trainer.engine.wrapper import Engine
from ds_trainer.errors import ModelError
from ds_trainer.protocols import Objective


def prepare_deepspeed(device: torch.device, local_world_size: int) -> None:
    """Import DeepSpeed so that it adopts this device and compiles nothing we do not use. Before the process group."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # On the CPU, DeepSpeed counts devices by LOCAL_SIZE, which torchrun does not set.
        os.environ.setdefault("LOCAL_SIZE", str(local_world_size))
    import deepspeed.ops

    # 0.19 compiles this op on every start on a CPU; it only speeds up inference (deepspeed/comm/torch.py build_shm_op).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def require_precision(precision: str) -> None:
    """Refuse a precision that this device cannot compute in. After `prepare_deepspeed`.

    Raises:
        ModelError: with the ones it can.
    """
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    able = {"bf16": device.is_bf16_supported(), "fp16": device.is_fp16_supported(), "fp32": True}
    if not able[precision]:
        others = " or ".join(name for name, supported in able.items() if supported)
        raise ModelError(f"train.precision = {precision}: this {device.device_name()} does not compute in it. Set {others}.")


@contextmanager
def sharded_construction(config: dict[str, Any]) -> Iterator[None]:
    """Inside, transformers shards every weight the moment it is made, when the config says ZeRO-3. Collective.

    transformers keeps only a weak reference to this object: if it died here, sharding would silently be off.
    """
    if config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(config)
    try:
        with _freed_memory_given_back():
            yield
    finally:
        unset_hf_deepspeed_config()
        del alive


@contextmanager
def _freed_memory_given_back() -> Iterator[None]:
    """Inside, host memory of a freed tensor goes back to the system at once.

    Every weight is made whole for a moment and freed as soon as it is sharded. glibc would keep those blocks between the
    shards that stay, so that a process holds as much as if it had never sharded (measured: 440 MiB for a model of 376 on two
    ranks, 212 with this). Source: mallopt(3), M_MMAP_THRESHOLD.

    Once set, the thresholds no longer move by themselves, so at the end both get the values they would have moved to. With the
    initial M_TRIM_THRESHOLD of 128 KiB every step would give its memory back to the system and take it again page by page.
    """
    m_mmap_threshold, small, usual = -3, 1 << 20, 32 << 20  # 32 MiB is where glibc's own moving threshold ends up
    m_trim_threshold = -1
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        yield
        return
    libc.mallopt(m_mmap_threshold, small)
    try:
        yield
    finally:
        libc.mallopt(m_mmap_threshold, usual)
        libc.mallopt(m_trim_threshold, 2 * usual)  # as glibc does: malloc/malloc.c, `__libc_free`
        libc.malloc_trim(0)


def gather(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Make sharded parameters whole inside the context; at its end rank zero's values hold. Collective under ZeRO-3."""
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return context


def freeze(model: nn.Module, config: dict[str, Any], device: torch.device) -> Any:
    """A model that is only computed with, in evaluation mode: sharded as the trained one is under ZeRO-3. Collective there.

    Args:
        model: constructed in the same way as the trained one.
        config: the DeepSpeed config of the trained one.
        device: where it computes.

    Returns:
        What is called in its place; under ZeRO-3 by every rank together.
    """
    import deepspeed

    model.requires_grad_(False).eval()
    zero = config["zero_optimization"]
    if zero["stage"] != 3:
        return model.to(device)
    kept = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "bf16", "fp16")
    # Without an optimizer nothing of it is offloaded.
    sharded = {name: value for name, value in zero.items() if name != "offload_optimizer"}
    config = {name: config[name] for name in kept if name in config} | {"zero_optimization": sharded}
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    engine.eval()
    return engine


def gather_whole(layers: list[nn.Module], *, check: bool = True) -> None:
    """Have ZeRO-3 gather each of these modules with all it contains at once (what DeepSpeed calls a leaf module).

    DeepSpeed then takes a layer's gradients together, from a backward hook of the layer, and puts zeros for one that is not
    there. Which layers that is right for is decided before, by `model.layers.whole_layers`; here the first backward pass of
    each is checked, so that an error in that decision ends the run instead of training on wrong gradients.

    Args:
        layers: before `build_engine`.
        check: off for mixtures of experts, of which some get no tokens.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers:
        set_z3_leaf_module(layer, True)
        trained = [each for each in layer.parameters() if each.requires_grad]
        if check and trained:
            _check_first_gradients(layer, trained)


def _check_first_gradients(layer: nn.Module, trained: list[nn.Parameter]) -> None:
    def check(*_: Any) -> None:
        handle.remove()
        if any(each.grad is None for each in trained):
            raise ModelError(
                f"a {type(layer).__name__} is gathered whole under ZeRO-3, and its gradients were not complete when its "
                "backward pass had ended. Have its modules gathered one by one: "
                '"leaf_module": {"classes": []} in zero_optimization.'
            )

    # Registered before DeepSpeed's own hook, so it is called before it.
    handle = layer.register_full_backward_hook(check)


def build_engine(
    model: nn.Module,
    *,
    objective: Objective,
    config: dict[str, Any],
    optimizer_kind: OptimizerKind,
    own_schedule: bool,
    train: TrainSection,
    max_steps: int,
    report: Callable[[str], None],
    lora_plus: float = 1.0,
) -> Engine:
    """Wrap the model in a DeepSpeed engine. Collective.

    Args:
        model: with its objective attached and its adapters in place.
        objective: what is minimised.
        config: as `build_engine_config` made it, without any "auto".
        optimizer_kind: which implementation moves the weights.
        own_schedule: the learning rate follows `train.schedule`, not a `scheduler` block.
        train: learning rate, decay, schedule.
        max_steps: optimizer steps of the whole run.
        report: takes a line for the user.
        lora_plus: learning rate of LoRA's second matrices as a multiple of the others'.

    Raises:
        BuildError: an op must be compiled and cannot be.
    """
    import deepspeed

    zero = config["zero_optimization"]
    for what in ("offload_optimizer", "offload_param"):
        if (zero.get(what) or {}).get("device") == "nvme":
            build_op("async_io", report)
            break
    optimizer = build_optimizer(
        optimizer_kind,
        model,
        train,
        report,
        lora_plus,
        bf16_states=config.get("bf16", {}).get("bf16_optimizer_states", False),
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=None if optimizer is not None else parameter_groups(model, train, lora_plus),
        optimizer=optimizer,
        lr_scheduler=build_schedule(train, max_steps) if own_schedule else None,
        config=config,
        dist_init_required=False,
    )
    return Engine(engine, objective)
