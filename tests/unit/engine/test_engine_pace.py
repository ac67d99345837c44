"""What a rank computes itself is measured in modules without children, in the forward that is measured, and nowhere else."""

import time

import pytest
import torch
from torch import nn

from ds_trainer.engine.pace import MEASURED_MODULES, Pace


class Slow(nn.Linear):
    def forward(self, states):
        time.sleep(0.02)
        return super().forward(states)


class Waiting(nn.Sequential):
    """Waits as ZeRO-3 does for weights, outside of the modules without children."""

    def forward(self, states):
        time.sleep(0.05)
        return super().forward(states)


def test_waits_around_modules_and_what_is_not_measured_do_not_count():
    model = Waiting(Slow(4, 4), Waiting(Slow(4, 4)))
    pace = Pace(model, torch.device("cpu"))
    model(torch.ones(1, 4))
    assert pace.lap() == []
    for _ in range(2):
        with pace.measured():
            model(torch.ones(1, 4))
        model(torch.ones(1, 4))
    first, second = pace.lap()
    assert first == pytest.approx(0.04, abs=0.02)
    assert second == pytest.approx(0.04, abs=0.02)
    assert pace.lap() == []


def test_hooks_that_others_have_set_lie_outside():
    leaf = Slow(4, 4)
    leaf.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    leaf.register_forward_hook(lambda *_: time.sleep(0.05))
    pace = Pace(leaf, torch.device("cpu"))
    with pace.measured():
        leaf(torch.ones(1, 4))
    assert pace.lap() == [pytest.approx(0.02, abs=0.02)]


def test_of_many_modules_the_largest_are_measured():
    leaves = [nn.Linear(2, 2) for _ in range(MEASURED_MODULES)] + [Slow(8, 8)]
    pace = Pace(nn.ModuleList(leaves), torch.device("cpu"))
    with pace.measured():
        leaves[-1](torch.ones(1, 8))
        leaves[MEASURED_MODULES - 1](torch.ones(1, 2))
    assert len(pace._spans[0]) == 1
