"""The optimizer: one AdamW in the implementation that suits the device, with decay where decay belongs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ds_trainer.arguments.engine_config import OptimizerKind
from ds_trainer.arguments.schema import TrainSection
from ds_trainer.engine.offload import build_op
from ds_trainer.engine.schedule import learning_rate_factor
from ds_trainer.errors import ModelError


def parameter_groups(model: nn.Module, train: TrainSection, lora_plus: float = 1.0) -> list[dict[str, Any]]:
    """The trainable parameters by decay and learning rate.

    Matrices decay, vectors (norms, biases) and what `train.no_weight_decay` names do not. With
    `train.layer_learning_rate_decay` each layer learns at the rate of the one above it times that; what comes before the layers
    (embeddings) once more below the first, what comes after them (norm, head) as the last one. Source: Howard and Ruder 2018,
    "ULMFiT", section 3.2. With LoRA+ the second matrices learn at `lora_plus` times the rate of the first. Source: Hayou et al.
    2024, "LoRA+", section 4.

    Returns:
        Groups for an optimizer; the first one decays and has the highest rate of those that LoRA+ leaves alone.

    Raises:
        ModelError: nothing is trainable, or a pattern matches nothing that is.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ModelError("no parameter of the model is trainable; check the section `adapter`.")
    require_trained(train.no_weight_decay, list(trained))
    below = layers_below_the_last([name for name, _ in model.named_parameters()])
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        factor = train.layer_learning_rate_decay ** below[name] * (lora_plus if ".lora_B." in name else 1.0)
        # Under ZeRO-3 a sharded parameter is flat or empty; `ds_shape` is its true shape.
        # The vectors of (IA)3 have two dimensions, one of them 1.
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 and ".ia3_l." not in name
        decays = is_matrix and not any(fnmatchcase(name, pattern) for pattern in train.no_weight_decay)
        groups.setdefault((factor, decays), []).append(parameter)

    def place(key: tuple[float, bool]) -> tuple[bool, float, bool]:
        factor, decays = key
        return factor > 1.0, -factor, not decays

    return [
        {
            "params": groups[key],
            "weight_decay": train.weight_decay if key[1] else 0.0,
            **({"lr": train.learning_rate * key[0]} if key[0] != 1.0 else {}),
        }
        for key in sorted(groups, key=place)
    ]


def require_trained(no_weight_decay: Iterable[str], trained: Sequence[str]) -> None:
    """Refuse a pattern of `train.no_weight_decay` that matches no name of a trained weight."""
    for pattern in no_weight_decay:
        if not any(fnmatchcase(name, pattern) for name in trained):
            raise ModelError(
                f"train.no_weight_decay: {pattern} matches no weight that is trained. They have names such as "
                f"{', '.join(trained[:3])}."
            )


def layers_below_the_last(names: list[str]) -> dict[str, int]:
    """How many layers each weight is below the last: 0 for those of the last layer and what comes after the layers.

    The first number in a name is that of its layer.
    """
    layers = {name: int(found[1]) for name in names if (found := _LAYER.search(name))}
    last = max(layers.values(), default=-1)
    first = next((place for place, name in enumerate(names) if name in layers), 0)
    return {
        name: last - layers[name] if name in layers else last + 1 if place < first else 0 for place, name in enumerate(names)
    }


_LAYER = re.compile(r"\.(\d+)\.")


def build_optimizer(
    kind: OptimizerKind,
    model: nn.Module,
    train: TrainSection,
    report: Callable[[str], None],
    lora_plus: float = 1.0,
    *,
    bf16_states: bool = False,
) -> torch.optim.Optimizer | None:
    """Build AdamW over the trainable parameters; None when DeepSpeed builds the optimizer itself.

    Args:
        kind: which implementation.
        model: the model.
        train: learning rate, decay, betas, eps.
        report: takes a line for the user.
        lora_plus: see `parameter_groups`.
        bf16_states: DeepSpeed's `bf16_optimizer_states`, which CPUAdam must be told itself.

    Raises:
        BuildError: the implementation has to be compiled and cannot be.
    """
    if kind == "deepspeed":
        return None
    groups = parameter_groups(model, train, lora_plus)
    options: dict[str, Any] = {"lr": train.learning_rate, "betas": tuple(train.betas), "eps": train.eps}
    if kind == "torch_adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    build_op("cpu_adam" if kind == "cpu_adam" else "fused_adam", report)
    if kind == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, adamw_mode=True, fp32_optimizer_states=not bf16_states, **options
        )
    else:
        from deepspeed.ops.adam import FusedAdam

        optimizer = FusedAdam(groups, adam_w_mode=True, **options)
    return optimizer


def build_schedule(train: TrainSection, max_steps: int) -> Callable[[Any], Any]:
    """A function optimizer -> torch scheduler, the form in which `deepspeed.initialize` takes one of ours.

    The optimizer it is called with may be DeepSpeed's wrapper. Every group's rate is multiplied by the same factor.
    """

    def factor(step: int) -> float:
        return learning_rate_factor(
            step,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
            max_steps=max_steps,
            min_fraction=train.min_learning_rate / train.learning_rate,
        )

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
