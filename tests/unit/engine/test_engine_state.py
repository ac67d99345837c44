"""A restored optimizer goes on as if it had never stopped, also where the rounding of its own counters shows."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from ds_trainer.arguments.schema import TrainSection
from ds_trainer.engine import state
from ds_trainer.engine.optim import build_optimizer

STEPS = 12


class OneFlat:
    """As much of a DeepSpeed engine at ZeRO-2 as a state is saved from and restored to: one partition, one parameter."""

    def __init__(self, kind: str) -> None:
        self.module = torch.nn.Linear(8, 8, bias=False)
        train = TrainSection(stage="pretrain", learning_rate=0.01, schedule="constant", precision="fp32")
        optimizer = build_optimizer(kind, self.module, train, print)
        with torch.no_grad():
            self.module.weight.copy_(torch.linspace(-1, 1, 64).view(8, 8))
        flat = self.module.weight.data.view(-1).clone().requires_grad_()
        optimizer.param_groups[0]["params"] = [flat]
        address = SimpleNamespace(start=0, numel=64)
        self.module.weight._hp_mapping = SimpleNamespace(lp_fragment_address=address, hp_fragment_address=address)
        self.flat = flat
        self.optimizer = SimpleNamespace(
            optimizer=optimizer,
            bit16_groups=[[self.module.weight]],
            single_partition_of_fp32_groups=[flat],
            param_groups=optimizer.param_groups,
            update_lp_params=lambda: None,
        )
        self.lr_scheduler = None
        self.global_steps = self.global_samples = self.skipped_steps = 0
        self.device = torch.device("cpu")

    def zero_optimization_stage(self) -> int:
        return 2

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.flat.grad = torch.randn(64, generator=torch.Generator().manual_seed(step))
            self.optimizer.optimizer.step()


@pytest.mark.parametrize(
    "kind", ["torch_adamw", pytest.param("cpu_adam", marks=[pytest.mark.builds, pytest.mark.timeout(900)])]
)
def test_a_restored_optimizer_goes_on_bit_for_bit_from_any_step(kind):
    if kind == "cpu_adam" and not shutil.which("g++"):
        pytest.skip("no C++ compiler: apt-get install g++")
    whole = OneFlat(kind)
    saved = []
    for step in range(STEPS):
        saved.append(state.snapshot(whole, {}))
        whole.train(step, step + 1)
    for step, (slices, rest) in enumerate(saved):
        again = OneFlat(kind)

        def read(name: str, kind: str, start: int, target: torch.Tensor, slices=slices) -> bool:
            target.copy_(slices[name, kind, start])
            return True

        state.restore(again, read, rest)
        again.train(step, STEPS)
        assert torch.equal(again.flat, whole.flat), f"from step {step}"


def test_copies_are_used_again_and_not_touched_by_training():
    engine = OneFlat("torch_adamw")
    engine.train(0, 1)
    copies: dict = {}
    first, _ = state.snapshot(engine, copies)
    kept = {key: value.clone() for key, value in first.items()}
    engine.train(1, 2)
    assert all(torch.equal(first[key], value) for key, value in kept.items())
    second, _ = state.snapshot(engine, copies)
    assert {value.data_ptr() for value in second.values()} == {value.data_ptr() for value in first.values()}
    plain, _ = state.snapshot(engine, None)
    assert plain.keys() == second.keys()
    assert all(torch.equal(plain[key], value) for key, value in second.items())
    assert plain["weight", "fp32", 0].data_ptr() == engine.flat.data_ptr()
