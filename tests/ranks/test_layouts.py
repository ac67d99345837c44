"""A saved state goes on in any layout: bit for bit in its own, within rounding at another stage, offload or number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import run_command, torchrun

WORKER = Path(__file__).parent / "workers" / "layouts.py"
STAGES = ("zero1", "zero2", "zero3")
LORA = tuple(f"{stage}_lora" for stage in STAGES)
OFFLOAD = ("zero2_offload", "zero3_offload")
SAME = (
    *STAGES,
    *LORA,
    *OFFLOAD,
    *(f"{stage}_bf16" for stage in STAGES),
    "zero1_bf16_fp32_gradients",
    "zero2_robin",
    "zero3_pieces",
    "zero2_dropout",
    "zero3_dropout",
)
COMPILED = ("zero2_cpu_adam", "zero3_nvme", "zero3_nvme_pieces")
TOLERANCE = 1e-6
"""Of a loss of about 4, in fp32: a few units in its last place."""

OTHER = [
    *[(f"{a}_of_2", b, 2) for a in STAGES for b in (*STAGES, *OFFLOAD) if a != b],
    *[(f"{a}_of_2", b, 2) for a in OFFLOAD for b in ("zero2", "zero3")],
    *[(f"{a}_of_2", b, 2) for a in LORA for b in LORA if a != b],
    *[(f"{a}_of_2", a, 1) for a in (*STAGES, *LORA, *OFFLOAD)],
    *[(f"{a}_of_1", a, 2) for a in (*STAGES, *LORA, *OFFLOAD)],
    ("zero2_of_2", "zero3", 1),
    ("zero3_of_1", "zero2", 2),
]
"""(state, layout it goes on in, ranks)"""
OTHER_COMPILED = [
    ("zero2_of_2", "zero2_cpu_adam", 2),
    ("zero2_cpu_adam_of_2", "zero3", 2),
    ("zero3_of_2", "zero3_nvme", 2),
    ("zero3_nvme_of_2", "zero2", 2),
    ("zero3_nvme_of_2", "zero3_nvme", 1),
]


def work(folder: Path, ranks: int, tasks: list[str], timeout: float = 240) -> None:
    done = run_command(torchrun(ranks, str(WORKER), str(folder), *tasks), cwd=folder, timeout=timeout)
    assert done.code == 0, done.text[-3000:]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    saves = [f"save:{name}" for name in SAME]
    work(folder, 2, saves + [f"resume:{name}_of_2:{name}" for name in SAME])
    work(folder, 1, [f"save:{name}" for name in (*STAGES, *LORA, *OFFLOAD)])
    for ranks in (1, 2):
        work(folder, ranks, [f"resume:{state}:{name}" for state, name, on in OTHER if on == ranks])
    return folder


@pytest.fixture(scope="module")
def seen_compiled(seen: Path) -> Path:
    if not shutil.which("g++") or not Path("/usr/include/libaio.h").exists():
        pytest.skip("no C++ compiler or no libaio: apt-get install g++ libaio-dev")
    tasks = [f"{what}:{name}" for name in COMPILED for what in ("save", f"resume:{name}_of_2")]
    tasks += [f"resume:{state}:{name}" for state, name, on in OTHER_COMPILED if on == 2]
    work(seen, 2, tasks, timeout=900)
    work(seen, 1, [f"resume:{state}:{name}" for state, name, on in OTHER_COMPILED if on == 1])
    return seen


def the_whole_run_and_the_resumed_one(folder: Path, state: str, name: str, ranks: int):
    whole, resumed = torch.load(folder / f"{state}.pt"), torch.load(folder / f"{state}__{name}_of_{ranks}.pt")
    assert len(whole["losses"]) == 6
    assert whole["weights"].keys() == resumed["weights"].keys()
    return whole["losses"][3:], whole["weights"], resumed["losses"], resumed["weights"]


def require_equal(folder: Path, name: str) -> None:
    losses, weights, resumed_losses, resumed_weights = the_whole_run_and_the_resumed_one(folder, f"{name}_of_2", name, 2)
    assert resumed_losses == losses
    for each, value in weights.items():
        assert torch.equal(value, resumed_weights[each]), each


def require_close(folder: Path, state: str, name: str, ranks: int) -> None:
    losses, weights, resumed_losses, resumed_weights = the_whole_run_and_the_resumed_one(folder, state, name, ranks)
    for ours, theirs in zip(resumed_losses, losses, strict=True):
        assert abs(float.fromhex(ours) - float.fromhex(theirs)) <= TOLERANCE
    for each, value in weights.items():
        assert torch.allclose(value, resumed_weights[each], atol=1e-6, rtol=0), each


@pytest.mark.parametrize("name", SAME)
def test_the_same_layout_goes_on_bit_for_bit(seen, name):
    require_equal(seen, name)


@pytest.mark.parametrize(("state", "name", "ranks"), OTHER)
def test_another_layout_goes_on_within_rounding(seen, state, name, ranks):
    require_close(seen, state, name, ranks)


@pytest.mark.builds
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", COMPILED)
def test_the_same_layout_with_a_compiled_op_goes_on_bit_for_bit(seen_compiled, name):
    require_equal(seen_compiled, name)


@pytest.mark.builds
@pytest.mark.timeout(1300)
@pytest.mark.parametrize(("state", "name", "ranks"), OTHER_COMPILED)
def test_another_layout_with_a_compiled_op_goes_on_within_rounding(seen_compiled, state, name, ranks):
    require_close(seen_compiled, state, name, ranks)


def test_the_optimizer_states_decide_what_the_last_steps_are(seen):
    """Otherwise a state that was not restored would pass too: what Adam has seen must show in the losses."""
    losses = [float.fromhex(each) for each in torch.load(seen / "zero2_of_2.pt")["losses"]]
    assert len(set(losses)) == 6
