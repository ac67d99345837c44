"""A probe answers in time or says why not, whatever its host prints, and ends with everything it started."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT

from ds_trainer.doctor import probe
from ds_trainer.doctor.remote import Host, Unanswered, ask_all, clock_offset, local_command, ssh_command


@pytest.fixture
def local():
    """A probe on this machine, with a variable sent along."""
    host = Host("here", 1, local_command(), {"SENT": "a 'b' $c"})
    host.hello(20)
    assert host.lost is None
    yield host
    host.close()


def test_a_login_may_print_what_it_likes():
    command = ["bash", "-c", f"printf 'Welcome! ds_trainer-doctor: no line end'; exec {shlex.join(local_command())}"]
    host = Host("here", 1, command, {})
    host.hello(20)
    assert host.lost is None
    offset, error = clock_offset(host, 5)
    assert abs(offset) <= error < 1
    host.close()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["bash", "-c", "echo 'key refused' >&2; exit 255"], "key refused"),
        (["bash", "-c", "exit 3"], "the connection ended, exit code 3"),
        (["sleep", "60"], "no answer within 1 s"),
        (["no-such-ssh"], "no-such-ssh is not installed on this machine"),
    ],
)
def test_a_host_without_an_answer_says_why(command, why):
    host = Host("node1", 1, command, {})
    host.hello(1)
    assert host.lost == why
    with pytest.raises(Unanswered, match=why):
        host.ask("unlisten", 1)
    host.close()


def test_the_command_for_ssh_cannot_be_read_as_an_option_and_keeps_its_words_together():
    command = ssh_command("node1", {"PYTHONPATH": "/a b:/c'd"}, ["-p", "2222"])
    *options, dashes, host, words = command
    assert options == ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-p", "2222"]
    assert (dashes, host) == ("--", "node1")
    program = b"import os; print(os.environ['PYTHONPATH'], os.getcwd())".ljust(len(Path(probe.__file__).read_bytes()))
    done = subprocess.run(["sh", "-c", words], input=program, capture_output=True, timeout=30, check=True)
    assert done.stdout.decode() == f"/a b:/c'd {Path.cwd()}\n"


def test_what_is_sent_along_is_there_and_only_fingerprints_come_back(local):
    facts = local.ask("facts", 120, variables=["SENT", "NOT_SENT"], port=29500, torch_seconds=1e-9)
    assert facts["variables"] == {"SENT": probe.fingerprint("a 'b' $c")}
    assert facts["torch"] == {"error": "no answer within 0 s"}
    assert facts["code"]["folder"] == str(ROOT / "ds_trainer")
    assert len(facts["code"]["files"]["loop.py"]) == 12
    assert {"name": "lo", "address": "127.0.0.1", "loopback": True} in facts["interfaces"]


def test_a_question_that_fails_is_told(local):
    answers = ask_all([local], "see_tokens", 5, lambda host: {"folder": 3, "names": ["x"], "seconds": 0})
    assert answers == {}
    assert local.lost is not None
    assert "`see_tokens` failed there: TypeError" in local.lost


def test_hosts_call_one_another_and_know_who_answers(local):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        assert local.ask("listen", 5, port=taken, token="me")["rendezvous"] is None
    ports = local.ask("listen", 5, port=0, token="me")
    other = ports["other"]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        calls = [["127.0.0.1", other, "me"], ["127.0.0.1", other, "you"], ["127.0.0.1", closed.getsockname()[1], "me"]]
        assert local.ask("dial", 10, calls=calls)["results"] == ["ok", "someone else", "refused"]
    local.ask("unlisten", 5)
    assert local.ask("dial", 10, calls=calls[:1])["results"] == ["refused"]


def test_the_owner_of_a_port_is_found():
    with socket.create_server(("0.0.0.0", 0)) as busy:
        port = busy.getsockname()[1]
        owner = probe.port_owner(port)
        assert owner is not None
        assert owner["pid"] == os.getpid()
        assert "pytest" in owner["command"]
        assert port < owner["free"] < port + 200
    assert probe.port_owner(port) is None


def test_the_run_folder_is_left_as_it_was(local, tmp_path: Path):
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    new = tmp_path / "a" / "b"
    assert local.ask("leave_token", 5, folder=str(new), name=".doctor")["checkpoints"] == 0
    assert local.ask("leave_token", 5, folder=str(tmp_path / "run"), name=".doctor")["checkpoints"] == 1
    assert local.ask("see_tokens", 5, folder=str(new), names=[".doctor", ".other"], seconds=0)["seen"] == [".doctor"]
    (new / "kept").touch()
    local.ask("remove_tokens", 5)
    assert [path.name for path in new.iterdir()] == ["kept"]
    (new / "kept").unlink()
    local.ask("remove_tokens", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "file").touch()
    assert "Not a directory" in local.ask("leave_token", 5, folder=str(tmp_path / "file" / "x"), name=".doctor")["error"]


def test_paths_are_told_apart_by_names_and_sizes(local, tmp_path: Path):
    def digest(path: Path) -> str:
        return str(local.ask("paths", 5, paths=[str(path)])["paths"][str(path)]["digest"])

    (tmp_path / "x.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    before = digest(tmp_path / "model"), digest(tmp_path / "*.jsonl")
    assert before == (digest(tmp_path / "model"), digest(tmp_path / "*.jsonl"))
    (tmp_path / "model" / "config.json").write_text("{ }")
    assert digest(tmp_path / "model") != before[0]
    assert local.ask("paths", 5, paths=["/nowhere/*"])["paths"] == {"/nowhere/*": {"found": False}}


def test_what_a_probe_started_ends_with_it(tmp_path: Path):
    host = Host("here", 1, local_command(), {"PYTHONPATH": str(tmp_path)})
    host.hello(20)
    (tmp_path / "sleeper.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    with pytest.raises(Unanswered, match="no answer within 2 s"):
        host.ask("run_module", 2, module="sleeper", arguments=[], seconds=60)
    pid = (tmp_path / "pid").read_text()
    host.close()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)
