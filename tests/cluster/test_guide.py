"""The guide "From one GPU to two nodes" is followed word for word on two fresh hosts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, metrics
from hosts import Host, environment

GUIDE = ROOT / "docs" / "two_nodes.md"
TYPED = re.compile(r"    (node[12])\$ (.*)")
SHOWN = 3000


class Shell:
    """A shell that somebody opened on a host, in a folder."""

    def __init__(self, host: Host, folder: Path) -> None:
        there = host.inside("env", "--chdir", str(folder), "bash")
        pipe = subprocess.PIPE
        # PYTHONPATH stands for the installation of this checkout that its own .venv would hold.
        variables = environment(PYTHONPATH=str(folder), CUDA_VISIBLE_DEVICES="")
        self.process = subprocess.Popen(there, env=variables, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def type(self, line: str) -> str:
        """Type a line and wait until it is done; what the terminal shows."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # ssh would read the lines that come after its own.
        self.process.stdin.write(f"{{ {line}\n}} </dev/null\necho '[done' $?]\n")
        self.process.stdin.flush()
        shown = []
        for answer in self.process.stdout:
            shown.append(answer)
            if done := re.search(r"\[done (\d+)\]", answer):
                assert done[1] == "0", f"{line}\n{''.join(shown)[-SHOWN:]}"
                return "".join(shown)
        pytest.fail(f"the shell ended at: {line}\n{''.join(shown)[-SHOWN:]}")


def copy_of_the_checkout(folder: Path) -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])


def test_the_guide_works_as_it_is_written(make_hosts, tmp_path):
    checkout = tmp_path / "checkout"
    copy_of_the_checkout(checkout)
    shells = {host.name: Shell(host, checkout) for host in make_hosts(2)}
    lines = [found.groups() for line in GUIDE.read_text().splitlines() if (found := TYPED.fullmatch(line))]
    shown = {line: shells[host].type(line) for host, line in lines}
    assert len(lines) == len([line for line in GUIDE.read_text().splitlines() if "$ " in line and line.startswith("    ")])

    [doctor] = [text for line, text in shown.items() if line.startswith("ds_trainer doctor")]
    [chosen] = [text for line, text in shown.items() if line.startswith("ds_trainer launch-command")]
    assert any(line.startswith("FIT: 2 hosts with 2 slots") for line in doctor.splitlines()), doctor
    command = "deepspeed --hostfile out/hosts --module ds_trainer train --config examples/two_nodes.yaml"
    assert command in chosen.splitlines()
    run = checkout / "out" / "two-nodes"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    starts = [(event["launcher"], event["world_size"]) for event in events if event["event"] == "started"]
    assert starts == [("torchrun", 1), ("torchrun", 2), ("deepspeed", 2), ("torchrun", 2)]
    losses = [line["loss"] for line in metrics(run)]
    assert [line["step"] for line in metrics(run)] == list(range(1, 9)), "each start went on where the one before had ended"
    assert losses[-1] < losses[0] - 0.5
