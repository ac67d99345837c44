"""How often ZeRO-3 gathers weights in a step, with and without forwards alone before the first one: run by torchrun."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

import torch
from parity import TRAIN, build_model, micro_batch

from ds_trainer import comm
from ds_trainer.engine.build import build_engine, gather, prepare_deepspeed, sharded_construction
from ds_trainer.model import attention
from ds_trainer.objectives import language_model

STEPS = 4
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def gathers(probed: bool) -> list[int]:
    """Of each step."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    name = "_PartitionedParameterCoordinator__all_gather_params_"
    plain, count = getattr(PartitionedParameterCoordinator, name), [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        count[0] += 1
        return plain(*arguments, **named)

    setattr(PartitionedParameterCoordinator, name, counted)
    with sharded_construction(CONFIG):
        model = build_model(gather)
    language_model.attach(model, chunked=True)
    engine = build_engine(
        model,
        objective=language_model.NEXT_TOKEN,
        config=CONFIG,
        optimizer_kind="torch_adamw",
        own_schedule=True,
        train=TRAIN,
        max_steps=STEPS,
        report=print,
    )
    if probed:
        engine.train_mode(False)
        states = partial(language_model.last_states, engine.forward)
        attention.probe_isolation(states, "documents", 64, torch.device("cpu"))
        for _ in range(2):  # as a resume does, to prove what it restored
            engine.evaluate(attention.arrange(micro_batch(0, range(2)), "documents"))
    engine.train_mode(True)
    found = []
    for step in range(STEPS):
        count[0] = 0
        batch = attention.arrange(micro_batch(step, range(2)), "documents")
        engine.micro_step(batch, torch.tensor([batch.num_targets]))
        engine.end_step()
        found.append(count[0])
    engine.close()
    setattr(PartitionedParameterCoordinator, name, plain)
    return found


def main() -> None:
    prepare_deepspeed(torch.device("cpu"), 1)
    with comm.process_group(torch.device("cpu"), rank=0, world_size=1, timeout_seconds=60):
        print(json.dumps({"probed": gathers(True), "not probed": gathers(False)}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
