"""The update on pairs is that of one plain torch process, whatever the stage, the ranks, the accumulation or the packing."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import run_command, torchrun
from torch.nn.functional import logsigmoid

WORKER = Path(__file__).parent / "workers" / "pairs_parity.py"
_spec = importlib.util.spec_from_file_location("pairs_parity_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
CASES = [(*cell, ranks) for cell in worker.CELLS for ranks in (1, 2) if not cell[0].startswith("adapter")]


def log_probs(model, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the targets of every answer of a step, one document at a time, and how many targets it has."""
    sums, sizes = [], []
    for pair in range(worker.PAIRS):
        for tokens, size in worker.documents(step, pair):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
            targets = torch.tensor(tokens[-size:])
            sums.append(logits[-1 - size : -1].log_softmax(-1).gather(-1, targets[:, None]).sum())
            sizes.append(size)
    return torch.stack(sums), torch.tensor(sizes)


def loss_of(name: str, model, other, step: int) -> torch.Tensor:
    if name == "reward":
        all_documents = [each for pair in range(worker.PAIRS) for each in worker.documents(step, pair)]
        values = torch.stack([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0] for ids, _ in all_documents])
        return -logsigmoid(values[0::2] - values[1::2]).mean()
    sums, sizes = log_probs(model, step)
    if name == "dpo":
        with torch.no_grad():
            of_other = log_probs(other, step)[0]
        ratios = sums - of_other
        h = worker.BETA * (ratios[0::2] - ratios[1::2])
        return (-0.9 * logsigmoid(h) - 0.1 * logsigmoid(-h)).mean()
    if name == "kto":
        with torch.no_grad():
            ratios = log_probs(other, step)[0]
        ratios = sums - ratios
        divergence = ratios[1::2].detach().mean().clamp(min=0)
        gains = worker.BETA * (ratios[0::2] - divergence)
        wanted = torch.tensor([worker.is_wanted(pair) for pair in range(worker.PAIRS)])
        return torch.where(wanted, 1.5 * (1 - gains.sigmoid()), 0.5 * (1 - (-gains).sigmoid())).mean()
    means = sums / sizes
    if name == "simpo":
        return -logsigmoid(2.0 * (means[0::2] - means[1::2]) - worker.GAMMA).mean()
    odds = means.exp() / (1 - means.exp())
    imitation = -sums[0::2].sum() / sizes[0::2].sum()
    return imitation - worker.WEIGHT * logsigmoid((odds[0::2] / odds[1::2]).log()).mean()


@cache
def plain_update(name: str) -> dict[str, torch.Tensor]:
    """Three steps of torch's own AdamW on the mean loss over all pairs in float64, without any of our parts."""
    model = worker.build_model(0, value_head=name == "reward").double()
    other = worker.build_model(1).double().eval()
    decay = [each for each in model.parameters() if each.ndim >= 2]
    keep = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=worker.EPS)
    losses = []
    for step in range(worker.STEPS):
        loss = loss_of(name, model, other, step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": torch.tensor(losses, dtype=torch.float64), "grad_norm": norm} | dict(model.named_parameters())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs_parity")
    for ranks in (1, 2):
        done = run_command(torchrun(ranks, str(WORKER), str(folder)), cwd=folder)
        assert done.code == 0, done.text[-3000:]
    return folder


def result_of(folder: Path, name, stage, accumulation, packed, ranks) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}_stage{stage}_ranks{ranks}_{accumulation}_{packed}.pt")


@pytest.mark.parametrize(("name", "stage", "accumulation", "packed", "ranks"), CASES)
def test_update_equals_that_of_one_plain_process(sharded, name, stage, accumulation, packed, ranks):
    result, plain = result_of(sharded, name, stage, accumulation, packed, ranks), plain_update(name)
    assert torch.allclose(result["losses"], plain["losses"], atol=1e-6, rtol=0)
    # Where gradients nearly cancel, Adam divides small ones by their own size: rounding counts for more.
    tolerance = 4e-6 if name == "reward" else 1e-6
    for parameter, expected in plain.items():
        assert torch.allclose(result[parameter].double(), expected, atol=tolerance, rtol=0), parameter
    base = result_of(sharded, *next(cell for cell in worker.CELLS if cell[0] == name), 1)
    for metric in [each for each in base if "/" in each or each in ("kl", "entropy")]:
        assert torch.allclose(result[metric], base[metric], atol=1e-6, rtol=1e-6), metric
    if name == "kto":
        assert result["kl"] > 0.01, "or nothing would be known of it"
        return
    assert torch.allclose(result["rewards/margins"], result["rewards/chosen"] - result["rewards/rejected"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_the_adapter_switched_off_is_the_same_reference_as_a_frozen_copy_of_the_base(sharded, stage, ranks):
    off, copied = (result_of(sharded, name, stage, 2, True, ranks) for name in ("adapter_off", "adapter_copy"))
    assert off["losses"].tolist() == copied["losses"].tolist()
    assert abs(float(off["losses"][0] - off["losses"][-1])) > 1e-4, "the adapter must have learnt something"
    assert off.keys() == copied.keys()
    assert all(torch.equal(off[name], copied[name]) for name in off)
