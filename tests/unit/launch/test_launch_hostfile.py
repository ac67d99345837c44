"""A hostfile is read strictly: what DeepSpeed would misread, run elsewhere or execute is refused with its line."""

import os
from pathlib import Path

import pytest

from ds_trainer.errors import ArgumentsError
from ds_trainer.launch.hostfile import HostSlots, read_hostfile

SHIPPED = sorted((Path(__file__).parents[3] / "hostfiles").glob("*.hostfile"))


def test_the_mark_that_some_editors_begin_a_file_with_is_passed_over(tmp_path):
    assert hosts(tmp_path, "\ufeffnode1 slots=8\n")[0].name == "node1"


def hosts(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    return read_hostfile(path)


def test_hosts_come_in_the_order_of_their_lines(tmp_path):
    text = "# two of them\n\nnode2.example.org slots=8   # the faster one\n  10.0.0.7\tslots=4\nnode-1_a   slots=64\r\n"
    assert hosts(tmp_path, text) == (
        HostSlots(name="node2.example.org", slots=8, line=3),
        HostSlots(name="10.0.0.7", slots=4, line=4),
        HostSlots(name="node-1_a", slots=64, line=5),
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_hostfiles_are_read(path):
    assert [host.slots for host in read_hostfile(path)] in ([8], [8, 8], [8, 4])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("node1", "how many processes run on node1? Write `node1 slots=8`."),
        ("node1 8", "`8` is not `slots=N`"),
        ("node1 slots", "Write `node1 slots=8`."),
        ("node1 slots=", "is not `slots=N`"),
        ("node1 slots=8garbage", "Write `node1 slots=8`."),
        ("node1 slots=4 max_slots=4", "Write `node1 slots=4`."),
        ("node1 slots = 4", "Write `node1 slots=4`."),
        ("node1 slot=4", "Write `node1 slots=4`."),
        ("node1 gpus=4", "Write `node1 slots=4`."),
        ("node1:4", "the port belongs into ssh's config"),
        ("node1 slots=0", "1 to 64 processes"),
        ("node1 slots=-1", "is not `slots=N`"),
        ("node1 slots=1.5", "is not `slots=N`"),
        ("node1 slots=08", "Write `node1 slots=8`."),
        ("node1 slots=99999999999", "1 to 64 processes"),
        ("node1 slots=8;id", "nothing after it"),
        ("-oProxyCommand=touch${IFS}/tmp/x slots=1", "ssh would take it as an option"),
        ("--help slots=1", "ssh would take it as an option"),
        ("$(id) slots=1", "is no host name"),
        ("`id` slots=1", "is no host name"),
        ("a;touch slots=1", "is no host name"),
        ("a&b slots=1", "is no host name"),
        ("a|b slots=1", "is no host name"),
        ("a/b slots=1", "is no host name"),
        ("../x slots=1", "is no host name"),
        ("'a' slots=1", "is no host name"),
        ("%h slots=1", "is no host name"),
        ("nodé slots=1", "is no host name"),
        ("node. .example slots=1", "is not `slots=N`"),
        ("node1- slots=1", "is no host name"),
        ("::1 slots=1", "is no host name"),
        ("node1,node2 slots=8", "Write one line a host"),
        ("node[1-4] slots=8", "Write one line a host"),
        ("root@node1 slots=8", "(`Host node1`, `User root`), here stands `node1` alone"),
        ("node1:2222 slots=8", "(`Host node1`, `Port 2222`)"),
    ],
)
def test_a_line_that_is_no_host_and_its_slots_is_refused_with_its_number(tmp_path, line, told):
    with pytest.raises(ArgumentsError) as refused:
        hosts(tmp_path, f"node0 slots=1\n{line}\n")
    [problem] = refused.value.problems
    assert problem.where == f"{tmp_path / 'hosts'}:2"
    assert told in problem.what


def test_all_wrong_lines_are_shown_at_once_and_a_host_twice_is_one(tmp_path):
    with pytest.raises(ArgumentsError, match=r"node1 stands in line 1 already") as refused:
        hosts(tmp_path, "node1 slots=1\nnode2\nnode1 slots=2\nnode3 slots=x\n")
    assert [problem.where.rpartition(":")[2] for problem in refused.value.problems] == ["2", "3", "4"]


@pytest.mark.parametrize("text", ["", "\n\n", "# node1 slots=8\n"])
def test_a_file_that_names_no_host_is_refused(tmp_path, text):
    with pytest.raises(ArgumentsError, match="names no host"):
        hosts(tmp_path, text)


def test_a_file_that_is_missing_a_folder_or_no_text_is_refused(tmp_path):
    with pytest.raises(ArgumentsError, match=r"No such file or directory.*would train on this machine alone"):
        read_hostfile(tmp_path / "hosts")
    os.mkfifo(tmp_path / "fifo")
    for no_file in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(ArgumentsError, match="is no file"):
            read_hostfile(no_file)
    (tmp_path / "binary").write_bytes(b"node1 slots=\xff")
    with pytest.raises(ArgumentsError, match="byte 12 is not UTF-8"):
        read_hostfile(tmp_path / "binary")
