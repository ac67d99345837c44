"""How fast AdamW moves weights, in each implementation there is for this device, and which of them the trainer takes.

Two layouts: one flat fp32 tensor, as ZeRO hands its partition to the optimizer, and the tensors of a small Llama as they are.
After three updates from the same gradients all implementations must hold the same weights, to rounding. They take turns in one
process. DeepSpeed's own is compiled on the first call, which takes minutes once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import SCRATCH, finish, goal, parse_arguments, take_turns, versions

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
KINDS = {"torch_adamw": "torch fused", "cpu_adam": "DeepSpeedCPUAdam"}
"""What `optimizer_kind` of the trainer says -> the line here that it stands for."""
Tensors = list[torch.Tensor]


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(1)
    makers: dict[str, Callable[[Tensors], Any]] = {
        "torch for-loop": lambda tensors: torch.optim.AdamW(tensors, foreach=False, **OPTIONS),
        "torch foreach": lambda tensors: torch.optim.AdamW(tensors, foreach=True, **OPTIONS),
        "torch fused": lambda tensors: torch.optim.AdamW(tensors, fused=True, **OPTIONS),
        "DeepSpeedCPUAdam": deepspeed_adam(),
    }
    flat = 5_000_000 if arguments.quick else 50_000_000
    layouts = {f"one tensor of {flat / 1e6:.0f} M": [(flat,)], "a Llama of 5.3 M": small_llama()}
    chosen = KINDS[default_kind()]
    rows: list[list[Any]] = []
    goals = []
    for layout, shapes in layouts.items():
        numbers = sum(torch.Size(shape).numel() for shape in shapes)
        difference = differences(makers, shapes if numbers < 10**7 else [(10**6,)])
        optimizers = {name: ready(make, shapes) for name, make in makers.items()}
        took = take_turns({name: each.step for name, each in optimizers.items()}, repeats=7, each_at_least=0.2)
        speed = {name: numbers / each["cpu_s"] / 1e6 for name, each in took.items()}
        best = max(speed.values())
        for name in makers:
            rows.append([layout, len(shapes), name, speed[name], speed[name] / best, difference[name], name == chosen])
        goals.append(goal(f"{layout}: what is taken by default", 0.97, speed[chosen] / best, "of the fastest", at_least=True))
    table = {
        "title": "AdamW on one core, fp32",
        "columns": ["layout", "tensors", "implementation", "M parameters/s", "fastest = 1", "largest difference", "default"],
        "rows": rows,
    }
    note = "The largest difference is to torch's for-loop after three updates, each of which moves a weight by up to 0.001."
    finish(
        "optimizer",
        quick=arguments.quick,
        goals=goals,
        tables=[table],
        notes=[note],
        packages=versions("torch", "deepspeed"),
        seed=0,
    )


def deepspeed_adam() -> Callable[[Tensors], Any]:
    from ds_trainer.engine.build import prepare_deepspeed
    from ds_trainer.engine.offload import build_op

    prepare_deepspeed(torch.device("cpu"), 1)
    build_op("cpu_adam", print)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return lambda tensors: DeepSpeedCPUAdam(tensors, adamw_mode=True, fp32_optimizer_states=True, **OPTIONS)


def small_llama() -> list[tuple[int, ...]]:
    """The shapes of its parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from turns import SMALL, llama

    fields = llama(*SMALL[1:])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    return [tuple(each.shape) for each in model.parameters()]


def default_kind() -> str:
    """What the trainer takes where nobody says anything."""
    from turns import SMALL, llama, write_case, write_texts

    from ds_trainer.arguments.engine_config import optimizer_kind
    from ds_trainer.arguments.merge import resolve

    SCRATCH.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        corpus = write_texts(Path(scratch) / "corpus")
        config = write_case(corpus, Path(scratch), "run", model=llama(*SMALL[1:]), micro=1, seq_len=64, stage=2)
        return optimizer_kind(resolve(config), "cuda" if torch.cuda.is_available() else "cpu")


def ready(make: Callable[[Tensors], Any], shapes: list[tuple[int, ...]]) -> Any:
    """An optimizer with weights, gradients and, after a first step, state."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for each in tensors:
        each.grad = torch.randn(each.shape, generator=generator)
    optimizer = make(tensors)
    optimizer.step()
    return optimizer


def differences(makers: dict[str, Callable[[Tensors], Any]], shapes: list[tuple[int, ...]]) -> dict[str, float]:
    """How far each implementation's weights are from those of the first one.

    Raises:
        AssertionError: further than rounding takes them.
    """
    found: dict[str, float] = {}
    first: Tensors = []
    for name, make in makers.items():
        optimizer = ready(make, shapes)
        for _ in range(2):
            optimizer.step()
        own = [each.detach() for group in optimizer.param_groups for each in group["params"]]
        first = first or own
        found[name] = max(float((a - b).abs().max()) for a, b in zip(first, own, strict=True))
        assert found[name] < 1e-6, f"{name} computes another update: {found[name]}"
    return found


if __name__ == "__main__":
    main()
