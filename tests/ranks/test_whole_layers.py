"""Where ZeRO-3 gathers whole decoder layers, its update is ZeRO-2's to the last bit: the same sums in the same order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import run_command, torchrun

WORKER = Path(__file__).parent / "workers" / "whole_layers.py"
EXACT = {"all weights": [0, 1, 2, 3], "tied, recomputed": [0, 1, 2, 3], "weights on the host": [0, 1, 2, 3]}
ROUNDED = {"lora": [1, 2, 3], "lora on two layers, recomputed where cheap": [0, 2, 3]}
"""The first layer that is trained is gathered module by module, which adds up its input's gradient in another order."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = run_command(torchrun(2, str(WORKER), str(folder)), cwd=folder)
    assert done.code == 0, done.text[-3000:]
    return folder


@pytest.mark.parametrize(("case", "whole"), [*EXACT.items(), *ROUNDED.items()])
def test_whole_layers_give_the_update_of_zero_2(trained, case, whole):
    result = torch.load(trained / f"{case}.pt")
    expected, found = result["split gradients"], result["whole layers"]
    assert found.pop("indices").tolist() == whole
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=0 if case in EXACT else 5e-7), name
