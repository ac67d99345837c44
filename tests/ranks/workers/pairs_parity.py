"""Train three steps on ragged rows of pairs and write the weights: run by torchrun.

Arguments: output folder. The pairs are the same whatever the number of ranks and the packing; test_pairs_parity.py computes the
same update in one plain torch process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from ds_trainer import comm
from ds_trainer.arguments.schema import AdapterSection, LoraSection, TrainSection
from ds_trainer.engine.build import build_engine, freeze, gather, prepare_deepspeed, sharded_construction
from ds_trainer.model import attention, load
from ds_trainer.model.adapter import add_adapter, base_of
from ds_trainer.objectives import dpo, kto, language_model, orpo, reference, reward, simpo
from ds_trainer.protocols import IGNORED, OTHERS, UNWANTED, WANTED, MicroBatch

STEPS, PAIRS, POSITIONS = 3, 8, 72
PACKED = ((0, 1, 2), (3,), (4, 5, 6, 7), ())  # pairs of each row: one rank in two may have a row without any
ALONE = tuple((pair,) for pair in range(PAIRS))
EPS = 1e-4  # with 1e-8, Adam turns the rounding of a gradient that is nearly zero into a whole step
TRAIN = TrainSection(stage="dpo", learning_rate=0.01, schedule="constant", max_grad_norm=1.0, weight_decay=0.1, eps=EPS)
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
BETA, GAMMA, WEIGHT = 0.3, 0.5, 0.7
CELLS = [
    *(("dpo", stage, accumulation, True) for stage in (1, 2, 3) for accumulation in (1, 2)),
    *(("dpo", stage, 2, False) for stage in (2, 3)),
    *((name, stage, 2, True) for name, stage in (("orpo", 3), ("reward", 3), ("simpo", 2))),
    *(("kto", stage, accumulation, packed) for stage, accumulation, packed in ((1, 1, True), (2, 2, False), (3, 2, True))),
    *((name, stage, 2, True) for name in ("adapter_off", "adapter_copy") for stage in (2, 3)),
]


def documents(step: int, pair: int) -> list[tuple[list[int], int]]:
    """Chosen and rejected: ids, and how many of the last are targets; of very different lengths."""
    generator = torch.Generator().manual_seed(100 * step + pair)
    prompt = torch.randint(0, 64, (1 + (pair + step) % 3,), generator=generator).tolist()
    answers = [1 + (3 * pair + step) % 6, 1 + (5 * pair + 2 * step) % 7]
    return [(prompt + torch.randint(0, 64, (size,), generator=generator).tolist(), size) for size in answers]


def is_wanted(pair: int) -> bool:
    """Of a pair whose first answer has a label, and whose second one is that of another record."""
    return pair % 3 != 0


def micro_batch(step: int, rows: list[tuple[int, ...]], name: str) -> MicroBatch:
    ids, labels, positions = (torch.zeros(len(rows), POSITIONS, dtype=torch.int64) for _ in range(3))
    labels.fill_(IGNORED)
    is_token = torch.zeros(len(rows), POSITIONS, dtype=torch.bool)
    for slot, pairs in enumerate(rows):
        at = 0
        for tokens, size in (each for pair in pairs for each in documents(step, pair)):
            end = at + len(tokens)
            ids[slot, at:end] = torch.tensor(tokens)
            trained = 1 if name == "reward" else size
            labels[slot, end - 1 - trained : end - 1] = ids[slot, end - trained : end]
            positions[slot, at:end] = torch.arange(len(tokens))
            at = end
        is_token[slot, :at] = True
        positions[slot, at:] = torch.arange(POSITIONS - at)
    kinds = [each for pairs in rows for pair in pairs for each in (WANTED if is_wanted(pair) else UNWANTED, OTHERS)]
    return MicroBatch(ids, labels, positions, is_token, torch.tensor(kinds) if name == "kto" and kinds else None)


def build_model(seed: int, gather_parameters=None, *, value_head: bool = False):
    from transformers import AutoConfig

    attention.register_document_attention()
    config = AutoConfig.for_model("llama", **CONFIG)
    model = load.build_model(config, precision="fp32", attention="documents", value_head=value_head)
    load.initialize_weights(model, seed, gather_parameters)
    model.train()
    return model


def run(name: str, stage: int, accumulation: int, packed: bool) -> dict[str, torch.Tensor]:
    ranks, rank = comm.world_size(), comm.rank()
    rows = PACKED if packed else ALONE
    micro = len(rows) // (ranks * accumulation)
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 5000},
    }
    gathering = gather if stage == 3 else None
    value_head, adapted = name == "reward", name.startswith("adapter")
    with sharded_construction(config):
        model = build_model(0, gathering, value_head=value_head)
        if adapted:
            model = add_adapter(model, AdapterSection(lora=LoraSection(rank=4)), 0)
    if value_head:
        reward.attach(model)
    else:
        language_model.attach(base_of(model), chunked=True)
    if name in ("dpo", "kto", "adapter_copy"):
        with sharded_construction(config):
            other = build_model(0 if adapted else 1, gathering)
        language_model.attach(other, chunked=True)
        of_reference = reference.copy(freeze(other, config, torch.device("cpu")))
    else:
        of_reference = reference.adapter_off
    numbers = {"loss": "sigmoid", "beta": BETA, "label_smoothing": 0.1}
    objective = {
        "orpo": orpo.objective(odds_weight=WEIGHT),
        "simpo": simpo.objective(beta=2.0, gamma=GAMMA),
        "reward": reward.BRADLEY_TERRY,
        "kto": kto.objective(of_reference, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5),
    }.get(name) or dpo.objective(of_reference, **numbers)
    engine = build_engine(
        model,
        objective=objective,
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
        batches = [micro_batch(step, rows[start : start + micro], name) for start in starts]
        window = [attention.arrange(batch, "documents") for batch in batches]
        own = [sum(each) for each in zip(*map(engine.units, window), strict=True)]
        units = comm.sum_over_ranks(torch.tensor(own))
        engine.look_ahead(window)
        loss = sum(engine.micro_step(batch, units) for batch in window)
        outcome = engine.end_step()
        losses.append(float(comm.sum_over_ranks(loss)))
    sums = engine.take_metrics()
    values = [torch.stack([value.double(), torch.tensor(count).double()]) for value, count in sums.values()]
    total = comm.sum_over_ranks(torch.stack(values))
    result = {"losses": torch.tensor(losses, dtype=torch.float64), "grad_norm": torch.tensor(float(outcome.grad_norm))}
    result |= {metric: each[0] / each[1] for metric, each in zip(sums, total, strict=True)}
    for parameter_name, parameter in engine.model.named_parameters():
        with gather([parameter]) if stage == 3 else torch.no_grad():
            result[parameter_name] = parameter.detach().clone()
    engine.close()
    return result


def main() -> None:
    device = torch.device("cpu")
    ranks = int(os.environ["WORLD_SIZE"])
    prepare_deepspeed(device, ranks)
    with comm.process_group(device, rank=int(os.environ["RANK"]), world_size=ranks, timeout_seconds=60):
        for name, stage, accumulation, packed in CELLS:
            result = run(name, stage, accumulation, packed)
            if comm.rank() == 0:
                torch.save(result, Path(sys.argv[1]) / f"{name}_stage{stage}_ranks{ranks}_{accumulation}_{packed}.pt")


if __name__ == "__main__":
    main()
    os._exit(0)  # the interpreter's own end aborts now and then with torch's threads, see `endings._leave`
