"""Plant a number that is not finite on one rank, at every ZeRO stage and precision, and write what became of the weights.

Run by torchrun. Arguments: output file, and the cases as JSON: lists of stage, precision, offload, rank, place. The place is
`loss`; `value`: the loss alone, with gradients that are finite; or `gradient`: them alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ds_trainer import comm
from ds_trainer.arguments.schema import TrainSection
from ds_trainer.engine.build import build_engine, gather, prepare_deepspeed, sharded_construction
from ds_trainer.model import attention, load
from ds_trainer.objectives import language_model
from ds_trainer.protocols import LossSums, MicroBatch, Objective

POISONED_STEP = 1
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


class Spoiled(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


def rows(step: int, index: int) -> Any:
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(100 * step + index))
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    batch = MicroBatch(
        input_ids=ids, labels=labels, position_ids=torch.arange(24)[None], is_token=torch.ones(1, 24, dtype=torch.bool)
    )
    return attention.arrange(batch, "documents")


def weights(engine: Any, stage: int) -> list[str]:
    found = []
    for _, parameter in engine.model.named_parameters():
        with gather([parameter]) if stage == 3 else torch.no_grad():
            assert torch.isfinite(parameter).all()
            found.append(hashlib.sha256(parameter.detach().view(torch.uint8).numpy().tobytes()).hexdigest())
    return found


def run(stage: int, precision: str, offload: bool, rank: int, place: str) -> dict[str, Any]:
    from transformers import AutoConfig

    lowest_scale, precision = precision == "fp16 at its lowest scale", precision.partition(" ")[0]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 5000},
    }
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 0 if lowest_scale else 4, "hysteresis": 1}
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    with sharded_construction(config):
        attention.register_document_attention()
        model = load.build_model(AutoConfig.for_model("llama", **CONFIG), precision=precision, attention="documents")
        load.initialize_weights(model, 0, gather if stage == 3 else None)
        model.train()
    language_model.attach(model, chunked=True)
    poisoned = False

    def sums(call: Any, batch: Any) -> LossSums:
        loss = language_model.nll_sum(call, batch)
        if poisoned and comm.rank() == rank:
            loss = {"loss": loss * float("nan"), "value": loss + float("nan"), "gradient": Spoiled.apply(loss)}[place]
        return LossSums(loss.reshape(1), {})

    engine = build_engine(
        model,
        objective=Objective(sums=sums, units=language_model.NEXT_TOKEN.units),
        config=config,
        optimizer_kind="torch_adamw",
        own_schedule=True,
        train=TrainSection(stage="pretrain", learning_rate=0.01, schedule="constant", max_grad_norm=1.0),
        max_steps=4,
        report=print,
    )
    facts: dict[str, Any] = {"applied": [], "moved": [], "grad_norm": [], "finite": [], "seeks": []}
    before = weights(engine, stage)
    for step in range(3):
        window = [rows(step, 2 * micro + comm.rank()) for micro in range(2)]
        num_targets = comm.sum_over_ranks(torch.tensor(sum(batch.num_targets for batch in window)))
        loss = torch.zeros(())
        for micro, batch in enumerate(window):
            poisoned = step == POISONED_STEP and micro == rank  # the first of rank 0, the last of rank 1
            loss += engine.micro_step(batch, num_targets)
        outcome = engine.end_step()
        after = weights(engine, stage)
        facts["applied"].append(outcome.applied)
        facts["moved"].append(after != before)
        facts["finite"].append(bool(torch.isfinite(loss)))
        facts["grad_norm"].append(None if outcome.grad_norm is None else float(outcome.grad_norm))
        facts["seeks"].append(outcome.seeks_loss_scale)
        before = after
    engine.close()
    return {"ranks": comm.gather_objects(facts)}


def main() -> None:
    device, ranks = torch.device("cpu"), int(os.environ["WORLD_SIZE"])
    prepare_deepspeed(device, ranks)
    from deepspeed.accelerator import get_accelerator

    # It is: DeepSpeed asks for instructions that only some CPUs have.
    get_accelerator().is_fp16_supported = lambda: True
    with comm.process_group(device, rank=int(os.environ["RANK"]), world_size=ranks, timeout_seconds=60):
        found = []
        for case in json.loads(sys.argv[2]):
            found.append({"case": case, **run(*case)})
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end aborts now and then with torch's threads, see `endings._leave`
