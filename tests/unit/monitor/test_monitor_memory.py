"""Out of memory: recognised, counted, and answered with settings."""

import errno

import pytest
import torch

from ds_trainer.monitor import memory

ASKED = {
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "seq_len": 1024,
    "gradient_checkpointing": False,
    "stage": 2,
    "ranks": 8,
    "offload_optimizer": False,
    "offload_param": False,
    "device_type": "cuda",
}


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


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(1, (2.0, 2.0, 3.0)), (2, (2.0, 0.5, 3.0)), (3, (0.5, 0.5, 3.0))],
)
def test_states_are_split_as_zero_splits_them(stage, expected):
    held = memory.states_bytes(
        parameters=1, trained=1, precision="bf16", stage=stage, ranks=4, offload_optimizer=False, offload_param=False
    )
    assert tuple(held.values()) == expected


def test_frozen_weights_have_no_gradients_and_offloaded_states_are_elsewhere():
    held = memory.states_bytes(
        parameters=100, trained=10, precision="fp32", stage=3, ranks=2, offload_optimizer=True, offload_param=False
    )
    assert held == {"parameters": 200.0, "gradients": 0.0, "optimizer states": 0.0}
    held = memory.states_bytes(
        parameters=100, trained=10, precision="fp32", stage=1, ranks=2, offload_optimizer=True, offload_param=False
    )
    assert held == {"parameters": 400.0, "gradients": 40.0, "optimizer states": 0.0}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {},
            [
                "train.micro_batch_size=2 train.gradient_accumulation_steps=4",
                "model.gradient_checkpointing=true",
                "deepspeed.zero_optimization.stage=3",
            ],
        ),
        (
            {"micro_batch_size": 9, "gradient_checkpointing": True, "stage": 3},
            [
                "train.micro_batch_size=3 train.gradient_accumulation_steps=6",
                "deepspeed.zero_optimization.offload_optimizer.device=cpu",
                "deepspeed.zero_optimization.offload_param.device=cpu",
            ],
        ),
        (
            {"micro_batch_size": 1, "ranks": 1, "device_type": "cpu"},
            ["model.gradient_checkpointing=true", "data.seq_len=512", "a smaller model, or more ranks"],
        ),
    ],
)
def test_the_settings_to_change_are_concrete_and_apply_to_this_run(changed, expected):
    assert memory.what_to_change(**{**ASKED, **changed}) == expected


def test_what_a_process_holds_on_the_cpu_grows_with_what_it_allocates():
    def held() -> float:
        return float(memory.measured(torch.device("cpu")).split("holds ")[1].split(" GiB")[0])

    before = held()
    kept = torch.ones(2**26)  # 256 MiB
    assert held() - before == pytest.approx(0.25, abs=0.05)
    assert kept.sum() == 2**26
