"""Train three steps on ragged rows at every ZeRO stage and accumulation, and write the weights: run by torchrun.

Arguments: output folder. The rows are the same whatever the number of ranks; test_update_parity.py computes the same update
in one plain torch process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from ds_trainer import comm
from ds_trainer.arguments.schema import TrainSection
from ds_trainer.engine.build import build_engine, gather, prepare_deepspeed, sharded_construction
from ds_trainer.model import attention, load
from ds_trainer.objectives import language_model
from ds_trainer.protocols import IGNORED, MicroBatch

STEPS, ROWS, POSITIONS = 3, 6, 24
EPS = 1e-4  # with 1e-8, Adam turns the rounding of a gradient that is nearly zero into a whole step
TRAIN = TrainSection(stage="pretrain", learning_rate=0.01, schedule="constant", max_grad_norm=1.0, weight_decay=0.1, eps=EPS)
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def row(step: int, index: int) -> dict[str, torch.Tensor]:
    """One row of two documents and padding, with very different numbers of targets from row to row."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    ids = torch.randint(0, 64, (POSITIONS,), generator=generator)
    first = 2 + (step + 5 * index) % 9
    end = first + 2 + (7 * index + step) % 12
    labels = torch.full((POSITIONS,), IGNORED)
    labels[: first - 1] = ids[1:first]
    if index % 3:  # every third row trains its first document only
        labels[first : end - 1] = ids[first + 1 : end]
    positions = torch.cat([torch.arange(first), torch.arange(end - first), torch.arange(POSITIONS - end)])
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "is_token": torch.arange(POSITIONS) < end}


def micro_batch(step: int, indices: range) -> MicroBatch:
    rows = [row(step, index) for index in indices]
    return MicroBatch(**{name: torch.stack([each[name] for each in rows]) for name in rows[0]})


def build_model(gather_parameters=None):
    from transformers import AutoConfig

    attention.register_document_attention()
    model = load.build_model(AutoConfig.for_model("llama", **CONFIG), precision="fp32", attention="documents")
    load.initialize_weights(model, 0, gather_parameters)
    model.train()
    return model


def run(stage: int, accumulation: int) -> dict[str, torch.Tensor]:
    ranks, rank = comm.world_size(), comm.rank()
    micro = ROWS // (ranks * accumulation)
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 5000},
    }
    with sharded_construction(config):
        model = build_model(gather if stage == 3 else None)
    language_model.attach(model, chunked=True)
    engine = build_engine(
        model,
        objective=language_model.NEXT_TOKEN,
        config=config,
        optimizer_kind="torch_adamw",
        own_schedule=True,
        train=TRAIN,
        max_steps=STEPS,
        report=print,
    )
    losses = []
    for step in range(STEPS):
        starts = [(m * ranks + rank) * micro for m in range(accumulation)]
        window = [attention.arrange(micro_batch(step, range(start, start + micro)), "documents") for start in starts]
        num_targets = comm.sum_over_ranks(torch.tensor(sum(batch.num_targets for batch in window)))
        loss = sum(engine.micro_step(batch, num_targets) for batch in window)
        outcome = engine.end_step()
        losses.append(float(comm.sum_over_ranks(loss)))
    result = {"losses": torch.tensor(losses, dtype=torch.float64), "grad_norm": torch.tensor(float(outcome.grad_norm))}
    for name, parameter in engine.model.named_parameters():
        with gather([parameter]) if stage == 3 else torch.no_grad():
            result[name] = parameter.detach().clone()
    engine.close()
    return result


def main() -> None:
    device = torch.device("cpu")
    ranks = int(os.environ["WORLD_SIZE"])
    prepare_deepspeed(device, ranks)
    with comm.process_group(device, rank=int(os.environ["RANK"]), world_size=ranks, timeout_seconds=60):
        for stage in (1, 2, 3):
            for accumulation in (1, 3):
                result = run(stage, accumulation)
                if comm.rank() == 0:
                    torch.save(result, Path(sys.argv[1]) / f"stage{stage}_ranks{ranks}_accumulation{accumulation}.pt")


if __name__ == "__main__":
    main()
    os._exit(0)  # the interpreter's own end aborts now and then with torch's threads, see `endings._leave`
