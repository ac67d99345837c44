"""Options that contradict each other, whose micro-batch is whose, and the port an IDE attaches to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_trainer.arguments.batch import BatchPlan
from ds_trainer.cli import _with_port
from ds_trainer.data.order import positions_of_window
from ds_trainer.debug.asked import Asked, require_consistent, require_rank, require_step
from ds_trainer.debug.listen import wait_for_ide
from ds_trainer.debug.ranks import accumulated, place_of
from ds_trainer.errors import RefusedError

RUN, CRASHED = Path("run.yaml"), Path("out/my-run")


def consistent(config=RUN, deepspeed=None, replay=None, **asked):
    require_consistent(Asked(**asked), config=config, deepspeed=deepspeed, replay=replay)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": None}, "debug --config run.yaml; or a crashed run: ds_trainer debug --replay out/my-run"),
        ({"replay": CRASHED}, "with --config: the run folder says what was run and how far. Leave it out"),
        (
            {"config": None, "replay": CRASHED, "steps": 3, "world_size": 2},
            "with --steps, --world-size: .* Leave them out",
        ),
        ({"rank": 5, "world_size": 8, "steps": 2}, "--rank 5 with --steps 2: one rank's share makes no update"),
        ({"rank": 5}, "of how many[?] Add --world-size, for example --world-size 6"),
        ({"rank": 8, "world_size": 8}, "--rank 8: with 8 ranks the last one is 7"),
    ],
)
def test_a_contradiction_is_refused_with_the_way_out(options, words):
    with pytest.raises(RefusedError, match=words):
        consistent(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 5, "world_size": 8, "steps": 1, "step": 4},
        {"rank": 5, "checkpoint": Path("step_00000100")},
        {"config": None, "replay": CRASHED, "rank": 1, "checkpoint": Path("step_00000100"), "step": 3},
    ],
)
def test_what_a_checkpoint_or_a_run_folder_tells_need_not_be_said(options):
    consistent(**options)


def test_a_rank_or_a_step_that_is_not_there_is_refused():
    with pytest.raises(RefusedError, match="the last one is 1"):
        require_rank(2, 2)
    with pytest.raises(RefusedError, match="--step 13: the run ends with step 12"):
        require_step(13, 12)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 7), st.integers(0, 1000))
def test_one_process_has_the_micro_batches_of_every_rank(micro, accumulation, ranks, begin):
    many = BatchPlan(micro_batch_size=micro, gradient_accumulation_steps=accumulation, data_parallel_size=ranks)
    one = accumulated(many)
    assert (one.global_batch_size, one.data_parallel_size) == (many.global_batch_size, 1)

    def window(batch, rank):
        return positions_of_window(
            begin,
            micro_batch_size=batch.micro_batch_size,
            gradient_accumulation_steps=batch.gradient_accumulation_steps,
            rank=rank,
            data_parallel_size=batch.data_parallel_size,
        )

    for index, positions in enumerate(window(one, 0)):
        rank, micro_batch = place_of(index, many, streamed=False)
        assert window(many, rank)[micro_batch] == positions


def test_the_rows_of_a_rank_lie_together_in_a_stream():
    many = BatchPlan(micro_batch_size=1, gradient_accumulation_steps=2, data_parallel_size=3)
    assert [place_of(index, many, streamed=True) for index in range(6)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("words", "filled_in"),
    [
        (["debug", "--listen"], ["debug", "--listen=5678"]),
        (["debug", "--listen", "--config", "a"], ["debug", "--listen=5678", "--config", "a"]),
        (["debug", "--listen", "7000", "--pdb"], ["debug", "--listen", "7000", "--pdb"]),
        (["debug", "--listen=7000"], ["debug", "--listen=7000"]),
        ([], []),
    ],
)
def test_the_port_may_be_left_out(words, filled_in):
    assert _with_port(words) == filled_in


def test_it_waits_for_an_ide_on_loopback_only(monkeypatch):
    calls, said = [], []

    def listen(address):
        calls.append(address)
        if address[1] == 1:
            raise RuntimeError("Can't listen for client connections: [Errno 98] Address already in use")

    fake = SimpleNamespace(listen=listen, wait_for_client=lambda: calls.append("wait"))
    monkeypatch.setitem(sys.modules, "debugpy", fake)
    wait_for_ide(7001, said.append)
    assert calls == [("127.0.0.1", 7001), "wait"]
    assert '"type": "debugpy", "request": "attach", "connect": {"host": "127.0.0.1", "port": 7001}' in said[0]
    assert "ssh -L 7001:127.0.0.1:7001" in said[0]
    with pytest.raises(RefusedError, match=r"--listen 1: .*already in use.*for example --listen 2"):
        wait_for_ide(1, said.append)


def test_without_debugpy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "debugpy", None)
    with pytest.raises(RefusedError, match=r"pip install 'ds-trainer\[debug\]'"):
        wait_for_ide(7001, print)


def test_the_port_of_debugpy_is_open_on_loopback_only(tmp_path):
    pytest.importorskip("debugpy")
    code = (
        "import sys, debugpy; from ds_trainer.debug.listen import wait_for_ide; debugpy.wait_for_client = lambda: None; "
        "wait_for_ide(58_431, print); print(open('/proc/net/tcp').read(), open('/proc/net/tcp6').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    places = [line.split()[1] for line in done.stdout.splitlines() if len(line.split()) > 10 and line.split()[3] == "0A"]
    assert [place for place in places if place.endswith(f":{58_431:04X}")] == [f"0100007F:{58_431:04X}"]
