"""Out of memory: recognised, and what a process holds measured."""

import errno

import pytest
import torch

from ds_trainer.monitor import memory


def test_a_real_allocation_that_fails_on_the_cpu_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert memory.ran_out(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_other_errors_are_told_apart(error, expected):
    assert memory.ran_out(error) is expected


def test_what_a_process_holds_on_the_cpu_grows_with_what_it_allocates():
    def held() -> float:
        return float(memory.measured(torch.device("cpu")).split("holds ")[1].split(" GiB")[0])

    before = held()
    kept = torch.ones(2**26)  # 256 MiB
    assert held() - before == pytest.approx(0.25, abs=0.05)
    assert kept.sum() == 2**26
