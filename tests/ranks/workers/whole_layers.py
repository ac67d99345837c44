"""Train at ZeRO-2 and at ZeRO-3 with whole layers gathered, and write the weights: run by torchrun.

Argument: output folder. The rows and the model are those of parity.py, with four layers; nothing is clipped, since the norm
is summed up in another order at each stage.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import parity
import torch
from transformers import AutoConfig

from ds_trainer import comm
from ds_trainer.arguments.engine_config import SMALLEST_BUCKET
from ds_trainer.arguments.schema import AdapterSection, FreezeSection, LoraSection
from ds_trainer.engine.build import build_engine, gather, gather_whole, prepare_deepspeed, sharded_construction
from ds_trainer.model import attention, load
from ds_trainer.model.adapter import add_adapter, base_of
from ds_trainer.model.layers import meta_model, whole_layers
from ds_trainer.model.stack import decoder_layers
from ds_trainer.objectives import language_model

ACCUMULATION = 3
ON_CPU = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
AT_ONCE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 3000, "reduce_bucket_size": 5000}
"""Every weight is released after its use, the next are prefetched, and a layer's gradients fill several buckets."""
CASES = {
    "all weights": {},
    "tied, recomputed": {"tied": True, "recompute": True, "zero": AT_ONCE},
    "lora": {"adapter": AdapterSection(lora=LoraSection(rank=4)), "zero": AT_ONCE},
    "dora": {"adapter": AdapterSection(lora=LoraSection(rank=4, dora=True)), "zero": AT_ONCE},
    "last two layers": {"adapter": AdapterSection(freeze=FreezeSection(last_layers=2)), "zero": AT_ONCE},
    "lora on two layers, recomputed where cheap": {
        "adapter": AdapterSection(lora=LoraSection(rank=4, target_modules=["1.self_attn.q_proj", "3.mlp.up_proj"])),
        "recompute": "selective",
    },
    "weights on the host": {"zero": {**ON_CPU, **AT_ONCE}},
}


def run(stage: int, *, tied=False, recompute=False, adapter=None, zero=None) -> dict[str, torch.Tensor]:
    ranks, rank = comm.world_size(), comm.rank()
    micro = parity.ROWS // (ranks * ACCUMULATION)
    parity.CONFIG |= {"num_hidden_layers": 4, "tie_word_embeddings": tied}
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 5000 if stage == 2 else SMALLEST_BUCKET,
            **({"stage3_param_persistence_threshold": 0, **(zero or {})} if stage == 3 else {}),
        },
    }
    with sharded_construction(config):
        model = parity.build_model(gather if stage == 3 else None)
        load.finish_model(model, tokens=0, resize=False, gradient_checkpointing=recompute, seed=0)
        if adapter:
            model = add_adapter(model, adapter, 0)
    found = {}
    if stage == 3:
        traced = meta_model(
            AutoConfig.for_model("llama", **parity.CONFIG),
            precision="fp32",
            attention="eager",
            trust_remote_code=False,
            gradient_checkpointing=False,
            adapter=adapter,
        )
        indices = whole_layers(traced).indices
        layers = decoder_layers(base_of(model))[2]
        gather_whole([layers[index] for index in indices])
        found["indices"] = torch.tensor(indices)
    language_model.attach(base_of(model), chunked=True)
    engine = build_engine(
        model,
        objective=language_model.NEXT_TOKEN,
        config=config,
        optimizer_kind="torch_adamw",
        own_schedule=True,
        train=parity.TRAIN,
        max_steps=parity.STEPS,
        report=print,
    )
    losses = []
    for step in range(parity.STEPS):
        starts = [(m * ranks + rank) * micro for m in range(ACCUMULATION)]
        rows = [parity.micro_batch(step, range(start, start + micro)) for start in starts]
        window = [attention.arrange(each, "documents") for each in rows]
        num_targets = comm.sum_over_ranks(torch.tensor([sum(batch.num_targets for batch in window)]))
        loss = sum(engine.micro_step(batch, num_targets) for batch in window)
        engine.end_step()
        losses.append(float(comm.sum_over_ranks(loss)))
    found["losses"] = torch.tensor(losses, dtype=torch.float64)
    for name, parameter in engine.model.named_parameters():
        with gather([parameter]) if stage == 3 else torch.no_grad():
            found[name] = parameter.detach().clone()
    engine.close()
    return found


def main() -> None:
    device = torch.device("cpu")
    ranks = int(os.environ["WORLD_SIZE"])
    prepare_deepspeed(device, ranks)
    with comm.process_group(device, rank=int(os.environ["RANK"]), world_size=ranks, timeout_seconds=60):
        for case, options in CASES.items():
            found = {"split gradients": run(2, **options), "whole layers": run(3, **options)}
            if comm.rank() == 0:
                torch.save(found, Path(sys.argv[1]) / f"{case}.pt")


if __name__ == "__main__":
    main()
    os._exit(0)  # the interpreter's own end aborts now and then with torch's threads, see `endings._leave`
