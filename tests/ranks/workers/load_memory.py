"""Peak memory per rank while a model is constructed and its weights are loaded under ZeRO-3: run by torchrun.

Arguments: `sharded` (our loader), `transformers` (its own) or `scratch` (initial weights), model folder, output folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from ds_trainer import comm
from ds_trainer.arguments.schema import ModelSection
from ds_trainer.engine import sharded_weights
from ds_trainer.engine.build import gather, prepare_deepspeed, sharded_construction
from ds_trainer.model import load


def resident_bytes() -> tuple[int, int]:
    """Memory of this process that no file backs, and pages of mapped files that it has read."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return sizes["RssAnon"], sizes["RssFile"]


def main() -> None:
    how, folder, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    device, rank, ranks = torch.device("cpu"), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    prepare_deepspeed(device, ranks)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    section = ModelSection(path=folder)
    private = mapped = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal private, mapped
        while not done.is_set():
            now = resident_bytes()
            private, mapped = max(private, now[0]), max(mapped, now[1])
            time.sleep(0.002)

    with comm.process_group(device, rank=rank, world_size=ranks, timeout_seconds=60):
        import deepspeed  # noqa: F401 - its own memory is not the model's
        from transformers import AutoModelForCausalLM  # noqa: F401

        model_config = load.load_config(section)
        before = resident_bytes()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        with sharded_construction(config):
            if how == "transformers":
                model = load.load_pretrained(section, model_config, precision="fp32", attention="sdpa")
            else:
                model = load.build_model(model_config, precision="fp32", attention="sdpa")
                if how == "scratch":
                    load.initialize_weights(model, 0, gather)
                else:
                    files = load.weight_files(folder)
                    assert sharded_weights.reason_against(model, files, config) is None
                    sharded_weights.load_sharded(model, files, rank)
        done.set()
        watcher.join()
        held = sum(parameter.ds_tensor.numel() * 4 for parameter in model.parameters())
        digests = {}
        for name, parameter in model.named_parameters():
            with gather([parameter]):
                digests[name] = hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
    fields = {
        "private_bytes": private - before[0],
        "mapped_bytes": mapped - before[1],
        "held_bytes": held,
        "digests": digests,
    }
    (out / f"{how}_rank{rank}.json").write_text(json.dumps(fields))


if __name__ == "__main__":
    main()
    os._exit(0)  # the interpreter's own end aborts now and then with torch's threads, see `endings._leave`
