"""The verdict stands in the first line with its fix, the table fits the terminal, a finding is told once for all its hosts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_doctor_judge import BROKEN, HEALTHY, facts, facts_on, host

from ds_trainer.doctor import report
from ds_trainer.doctor.judge import CHECKS, judge
from ds_trainer.launch.exports import LOST

ROOT = Path(__file__).parents[3]


def text_of(evidence):
    return report.as_text(evidence, judge(evidence))


def test_a_healthy_cluster_is_said_to_be_fit_in_the_first_line():
    assert text_of(HEALTHY).splitlines()[0] == "FIT: 3 hosts with 6 slots, nothing to mend"


def test_the_first_line_has_the_first_fix_and_how_many_follow():
    evidence = facts_on("node1", "node2", limits__nofile=[100, 100])(facts(python="3.12.1")(HEALTHY))
    first, *rest = text_of(evidence).splitlines()
    assert first == (
        "NOT FIT: versions on node2: Python 3.12.1, elsewhere 3.11.9. "
        "Fix: give node2 the same Python as the others (1 more below)"
    )
    assert "FAIL limits on node1, node2: 100 open files at most (ulimit -n)" in rest


def test_warnings_leave_a_cluster_fit():
    first = text_of(replace(HEALTHY, leftovers=("RANK",))).splitlines()[0]
    assert first == "FIT: 3 hosts with 6 slots, 1 warning. leftovers on this machine: RANK in the shell. Fix: unset RANK"


@pytest.mark.parametrize("name", BROKEN)
def test_prose_fits_in_the_terminal_and_commands_are_left_in_one_piece(name):
    _, *lines = text_of(BROKEN[name].broken(HEALTHY)).splitlines()
    assert max(len(line) for line in lines if not line.startswith("  fix: ")) <= report.WIDTH


def test_the_table_has_a_row_a_check_and_a_column_a_host():
    rows = report.table(HEALTHY, judge(facts(limits__nofile=[100, 100])(HEALTHY)))
    assert rows[0].split() == ["check", "here", "node1", "node2", "node3"]
    assert [row.split()[0] for row in rows[1:]] == [check.name for check in CHECKS]
    assert next(row for row in rows if row.startswith("limits")).split() == ["limits", "ok", "FAIL", "ok"]


def test_many_hosts_are_counted_and_only_those_that_stand_out_named():
    many = replace(HEALTHY, collectives=None, hosts=tuple(replace(host(1), name=f"worker-{number:03}") for number in range(40)))
    evidence = facts_on("worker-007", "worker-031", shm={"free": 0, "size": 0})(many)
    rows = report.table(evidence, judge(evidence))
    assert "shm            FAIL: worker-007, worker-031; 38 ok" in rows
    assert max(map(len, rows)) <= report.WIDTH


def test_collectives_are_told_by_size_with_the_slowest_rank():
    answer = {
        "bandwidth": [[name, size, 1.0, 3.5e9] for size in (4096, 1 << 20) for name in ("all-reduce", "all-gather")],
        "alone": [1.0, 1.0, 1.0, 1.3, 1.0, 1.0],
        "wrong": [],
        "device": "cuda",
    }
    text = text_of(replace(HEALTHY, collectives={"answer": answer, "failed": []}))
    assert "Collectives over 6 ranks (NCCL)" in text
    assert "  1 MiB       3.26 GiB/s      3.26 GiB/s" in text
    assert "slowest rank: 3 on node2, 1.30 times as long" in text


def test_json_says_the_same():
    evidence = facts(shm=None)(HEALTHY)
    fields = report.as_json(evidence, judge(evidence))
    assert fields["fit"] is False
    assert fields["verdict"] == text_of(evidence).splitlines()[0]
    assert fields["hosts"]["node2"]["facts"]["shm"] is None
    assert {each["check"] for each in fields["findings"]} == {check.name for check in CHECKS}


def test_the_docs_have_every_check_in_its_order_and_every_variable():
    page = (ROOT / "docs" / "doctor.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [check.name for check in CHECKS]
    for row, check in zip(rows, CHECKS, strict=True):
        assert row.split("|")[2].strip().rstrip(".") in check.asks.rstrip("."), check.name
    assert [name for name in LOST if f"`{name}`" not in page] == []
