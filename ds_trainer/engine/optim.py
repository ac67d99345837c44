"""The optimizer: one AdamW in the implementation that suits the device, with decay where decay belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ds_trainer.arguments.engine_config import OptimizerKind
from ds_trainer.arguments.schema import TrainSection
from ds_trainer.engine.offload import build_op
from ds_trainer.engine.schedule import learning_rate_factor
from ds_trainer.errors import ModelError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: matrices decay, vectors (norms, biases) do not.

    Raises:
        ModelError: nothing is trainable.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a sharded parameter is flat or empty; `ds_shape` is its true shape.
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            (decay if dimensions >= 2 else keep).append(parameter)
    if not decay and not keep:
        raise ModelError("no parameter of the model is trainable; check the section `adapter`.")
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    kind: OptimizerKind, model: nn.Module, train: TrainSection, report: Callable[[str], None]
) -> torch.optim.Optimizer | None:
    """Build AdamW over the trainable parameters; None when DeepSpeed builds the optimizer itself.

    Raises:
        BuildError: the implementation has to be compiled and cannot be.
    """
    if kind == "deepspeed":
        return None
    groups = parameter_groups(model, train.weight_decay)
    options: dict[str, Any] = {"lr": train.learning_rate, "betas": tuple(train.betas), "eps": train.eps}
    if kind == "torch_adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    build_op("cpu_adam" if kind == "cpu_adam" else "fused_adam", report)
    if kind == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
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
