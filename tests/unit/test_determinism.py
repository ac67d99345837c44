"""`train.deterministic`: torch refuses what it cannot repeat, and the run says so in its own words."""

import pytest
import torch

from ds_trainer.endings import _in_words
from ds_trainer.state import demand_determinism


def test_an_operation_without_a_deterministic_kernel_is_explained(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        demand_determinism()
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
        assert torch.utils.deterministic.fill_uninitialized_memory is False
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    said = _in_words(caught.value)
    assert said.startswith("RuntimeError: put_ does not have a deterministic implementation. train.deterministic allows")
    assert "use_deterministic_algorithms" not in said
