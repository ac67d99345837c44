"""Train three steps, keep the state, train three more; or go on from a kept state in any other layout: run by torchrun.

Arguments: a folder, then `save:LAYOUT`, `resume:FOLDER_OF_A_STATE:LAYOUT` and `held:LAYOUT`, done one after the other. A layout
is a name of LAYOUTS. The first two write their losses and final weights beside the states: what was seen of six steps, or of
the last three.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ds_trainer import comm
from ds_trainer.arguments.schema import AdapterSection, ModelSection, TrainSection
from ds_trainer.checkpoint.slices import SliceReader, file_name, write_slices
from ds_trainer.engine.build import build_engine, gather, prepare_deepspeed, sharded_construction
from ds_trainer.model import attention, load
from ds_trainer.model.adapter import add_adapter, base_of
from ds_trainer.model.quantize import is_held_in_4_bits
from ds_trainer.objectives import language_model
from ds_trainer.protocols import MicroBatch
from ds_trainer.state import step_seed

STEPS, HALF, ROWS, POSITIONS = 6, 3, 4, 16
VOCABULARY, HIDDEN = 64, 256
"""Large enough that a part of the state is really swapped to nvme (what is below 1 MiB stays in memory), and a loss of about 4,
of which fp32 resolves 2.4e-7."""
GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 1, "n_head": 2, "n_positions": 32}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FOLDER = Path(sys.argv[1])

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4}},
    "rslora": {"lora": {"rank": 4, "rslora": True}},
    "dora": {"lora": {"rank": 4, "dora": True}},
    "loraplus": {"lora": {"rank": 4, "learning_rate_ratio": 2.0}},
    "whole": {"lora": {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "pissa": {"lora": {"rank": 4, "init": "pissa"}},
    "olora": {"lora": {"rank": 4, "init": "olora"}},
    "ia3": {"ia3": {}},
    "vera": {"vera": {"rank": 16}},
    "oft": {"oft": {}},
    "further": {"lora": {"path": str(FOLDER / "adapter")}},
    "last": {"freeze": {"last_layers": 1, "train": ["lm_head.*"]}},
}
QUANTIZED = {f"nf4_{name}": ADAPTERS[name] for name in ADAPTERS if name not in ("pissa", "olora", "last")}
"""Beside a base in 4 bits, which is read from `base` in the folder."""
ADAPTERS |= QUANTIZED
CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": str(FOLDER / "nvme")}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2_robin": {"stage": 2, "round_robin_gradients": True},
    "zero3_pieces": {"stage": 3, "sub_group_size": 100_000},
    "zero2_offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3_offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
    "zero2_cpu_adam": {"stage": 2, "offload_optimizer": CPU, "kind": "cpu_adam"},
    "zero3_nvme": {"stage": 3, "offload_optimizer": NVME, "kind": "cpu_adam"},
    "zero3_nvme_pieces": {"stage": 3, "offload_optimizer": NVME, "sub_group_size": 300_000, "kind": "cpu_adam"},
    **{f"zero{stage}_bf16": {"stage": stage, "precision": "bf16"} for stage in (1, 2, 3)},
    "zero1_bf16_fp32_gradients": {"stage": 1, "precision": "bf16", "gradients": "fp32"},
    **{f"zero{stage}_lora": {"stage": stage, "adapter": ADAPTERS["lora"]} for stage in (1, 2, 3)},
    **{
        f"{name}_{adapter}": {**layout, "adapter": settings, "quantized": adapter in QUANTIZED}
        for adapter, settings in ADAPTERS.items()
        if adapter != "lora"
        for name, layout in {
            "zero1": {"stage": 1},
            "zero2": {"stage": 2},
            "zero3": {"stage": 3},
            "zero2_offload": {"stage": 2, "offload_optimizer": CPU},
            "zero3_offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
        }.items()
    },
    "zero2_dropout": {"stage": 2, "dropout": 0.1},
    "zero3_dropout": {"stage": 3, "dropout": 0.1},
}


def build(layout: dict[str, Any]):
    from transformers import AutoConfig

    stage, precision = layout["stage"], layout.get("precision", "fp32")
    extra = {name: value for name, value in layout.items() if name in ("offload_optimizer", "offload_param", "sub_group_size")}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 500_000, **extra}
    config = {
        "train_micro_batch_size_per_gpu": ROWS // comm.world_size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {**zero, "round_robin_gradients": layout.get("round_robin_gradients", False)},
        **({"data_types": {"grad_accum_dtype": layout["gradients"]}} if "gradients" in layout else {}),
    }
    dropout = layout.get("dropout", 0.0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    adapter = AdapterSection.model_validate(layout["adapter"]) if "adapter" in layout else None
    base = ModelSection(path=str(FOLDER / "base"), quantize="nf4") if layout.get("quantized") else None
    sharded = stage == 3 and not base
    model_config = (
        AutoConfig.for_model("llama", **LLAMA, tie_word_embeddings=False)
        if adapter
        else AutoConfig.for_model("gpt2", **GPT2, **drops, bos_token_id=0, eos_token_id=0)
    )
    with sharded_construction(config) if sharded else nullcontext():
        if base:
            model = load.load_pretrained(base, load.load_config(base), precision=precision, attention="sdpa")
        else:
            model = load.build_model(model_config, precision=precision, attention="sdpa")
            load.initialize_weights(model, 0, gather if sharded else None)
        if adapter:
            model = add_adapter(model, adapter, 0, gather if sharded else None)
    language_model.attach(base_of(model), chunked=True)
    engine = build_engine(
        model,
        objective=language_model.NEXT_TOKEN,
        config=config,
        optimizer_kind=layout.get("kind", "torch_adamw"),
        own_schedule=True,
        train=TrainSection(
            stage="pretrain",
            learning_rate=0.01,
            schedule="cosine",
            warmup_steps=2,
            weight_decay=0.1,
            precision=precision,
            eps=1e-4,
        ),
        max_steps=STEPS,
        report=print,
        lora_plus=adapter.lora.learning_rate_ratio if adapter and adapter.lora else 1.0,
    )
    engine.train_mode(True)
    return engine


def train(engine, first: int, last: int) -> list[str]:
    losses = []
    micro = ROWS // comm.world_size()
    for step in range(first, last):
        torch.manual_seed(step_seed(0, step, comm.rank()))
        ids = torch.randint(0, VOCABULARY, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(step))
        ids = ids[comm.rank() * micro : (comm.rank() + 1) * micro]
        labels = torch.cat([ids[:, 1:], torch.full((micro, 1), -100)], dim=1)
        positions = torch.arange(POSITIONS).expand(micro, -1)
        batch = attention.arrange(MicroBatch(ids, labels, positions, torch.ones_like(ids, dtype=torch.bool)), "sdpa")
        loss = engine.micro_step(batch, comm.sum_over_ranks(torch.tensor(batch.num_targets)))
        engine.end_step()
        losses.append(float(comm.sum_over_ranks(loss)).hex())
    return losses


def keep_what_was_seen(engine, name: str, losses: list[str]) -> None:
    weights = {}
    for parameter_name, parameter in engine.model.named_parameters():
        with gather([parameter]) if hasattr(parameter, "ds_id") else torch.no_grad():
            value = parameter.detach().clone()
            # As bytes: taken for numbers, some are not finite, and those equal nothing.
            weights[parameter_name] = value.view(torch.uint8) if is_held_in_4_bits(parameter) else value
    if comm.rank() == 0:
        torch.save({"losses": losses, "weights": weights}, FOLDER / f"{name}.pt")
    engine.close()


def save(name: str) -> None:
    engine = build(LAYOUTS[name])
    losses = train(engine, 0, HALF)
    folder = FOLDER / f"{name}_of_{comm.world_size()}"
    folder.mkdir(exist_ok=True)
    slices, rest = engine.snapshot(copy=True)
    losses += train(engine, HALF, STEPS)  # the copy must not see it
    write_slices(folder / file_name(comm.rank()), slices)
    if comm.rank() == 0:
        (folder / "rest.json").write_text(json.dumps(rest))
    keep_what_was_seen(engine, folder.name, losses)


def resume(state: str, name: str) -> None:
    engine = build(LAYOUTS[name])
    reader = SliceReader(sorted((FOLDER / state).glob("*.safetensors")))
    engine.restore(reader.read, json.loads((FOLDER / state / "rest.json").read_text()))
    keep_what_was_seen(engine, f"{state}__{name}_of_{comm.world_size()}", train(engine, HALF, STEPS))


def held(name: str) -> None:
    """Write down the shapes of packed weights that are whole on this rank when the backward pass begins."""
    engine = build(LAYOUTS[name])
    packed = {tuple(each.ds_shape) for each in engine.model.parameters() if is_held_in_4_bits(each)}
    plain = engine._engine.backward
    found: list[tuple[int, ...]] = []

    def backward(*arguments: Any, **named: Any) -> Any:
        gc.collect()
        found.extend(tuple(each.shape) for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.shape in packed)
        return plain(*arguments, **named)

    engine._engine.backward = backward
    train(engine, 0, 1)
    (FOLDER / f"held_{name}_{comm.rank()}.json").write_text(json.dumps({"of": sorted(packed), "held": found}))
    engine.close()


def main() -> None:
    device, ranks = torch.device("cpu"), int(os.environ["WORLD_SIZE"])
    prepare_deepspeed(device, ranks)
    with comm.process_group(device, rank=int(os.environ["RANK"]), world_size=ranks, timeout_seconds=60):
        for each in sys.argv[2:]:
            what, *names = each.split(":")
            {"save": save, "resume": resume, "held": held}[what](*names)
            comm.gather_objects(None)
            shutil.rmtree(FOLDER / "nvme", ignore_errors=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # the interpreter's own end aborts now and then with torch's threads, see `endings._leave`
