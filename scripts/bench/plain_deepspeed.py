"""A training loop with DeepSpeed's own checkpoints, as its documentation shows them: the control of kill_storm.py.

    plain_deepspeed.py FOLDER STEPS STEP_SECONDS

It saves every second step, and goes on from what `latest` names. SKEW in the environment is how many seconds each file of
rank 1 takes longer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist


def main(folder: Path, steps: int, step_seconds: float) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at every start on a CPU, for inference alone
    deepspeed.init_distributed("gloo")
    rank, save = dist.get_rank(), torch.save

    def slow_save(*arguments: object, **options: object) -> None:
        time.sleep(float(os.environ.get("SKEW", "0")))
        save(*arguments, **options)

    if rank == 1:
        torch.save = slow_save
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(320, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 320))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    path, client_state = engine.load_checkpoint(str(folder / "checkpoints"))
    first = client_state["step"] if path else 0
    dist.barrier()  # all ranks have loaded it
    if rank == 0 and path:
        print(f"RESUMING from step_{first}", flush=True)
    for step in range(first + 1, steps + 1):
        time.sleep(step_seconds)
        tokens = torch.randint(0, 320, (4, 16), generator=torch.Generator().manual_seed(2 * step + rank))
        loss = torch.nn.functional.cross_entropy(engine(tokens).flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": float(mean).hex()}) + "\n")
        if step % 2 == 0 or step == steps:
            engine.save_checkpoint(str(folder / "checkpoints"), tag=f"step_{step}", client_state={"step": step})
            dist.barrier()
            if rank == 0:
                print(f"saved step_{step}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
