"""The update is that of one plain torch process, whatever the ZeRO stage, the number of ranks or the accumulation."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from helpers import run_command, torchrun

WORKER = Path(__file__).parent / "workers" / "parity.py"
CASES = [(stage, ranks, accumulation) for stage in (1, 2, 3) for ranks in (1, 2) for accumulation in (1, 3)]


def plain_update() -> dict[str, torch.Tensor]:
    """Three steps of torch's own AdamW on the mean loss over all targets, one document at a time, without any of our parts."""
    spec = importlib.util.spec_from_file_location("parity_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    torch.manual_seed(0)
    model = worker.build_model()
    decay = [each for each in model.parameters() if each.ndim >= 2]
    keep = [each for each in model.parameters() if each.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=worker.EPS,
    )
    losses = []
    for step in range(worker.STEPS):
        total, count = 0.0, 0
        for index in range(worker.ROWS):
            row = worker.row(step, index)
            ends = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), worker.POSITIONS]
            for start, end in itertools.pairwise(ends):
                labels = row["labels"][start:end]
                if (labels != -100).any():
                    logits = model(input_ids=row["input_ids"][None, start:end], use_cache=False).logits[0]
                    total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
                    count += int((labels != -100).sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": torch.tensor(losses, dtype=torch.float64), "grad_norm": norm} | dict(model.named_parameters())


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    return plain_update()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    for ranks in (1, 2):
        done = run_command(torchrun(ranks, str(WORKER), str(folder)), cwd=folder)
        assert done.code == 0, done.text[-3000:]
    return folder


@pytest.mark.parametrize(("stage", "ranks", "accumulation"), CASES)
def test_update_equals_that_of_one_plain_process(plain, sharded, stage, ranks, accumulation):
    result = torch.load(sharded / f"stage{stage}_ranks{ranks}_accumulation{accumulation}.pt")
    assert result.keys() == plain.keys()
    assert torch.allclose(result["losses"], plain["losses"], atol=2e-6, rtol=0)
    for name, expected in plain.items():
        assert torch.allclose(result[name], expected, atol=2e-6, rtol=0), name


def test_the_rows_of_the_test_have_very_different_numbers_of_targets(plain):
    """Otherwise a mean of means would pass too."""
    spec = importlib.util.spec_from_file_location("parity_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    counts = [int((worker.row(step, index)["labels"] != -100).sum()) for step in range(3) for index in range(6)]
    assert max(counts) > 4 * min(counts)
