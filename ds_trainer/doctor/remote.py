"""Talk to all hosts at once: a probe on each, reached as DeepSpeed's launcher reaches it, with a time limit on every answer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ds_trainer.doctor import probe
from ds_trainer.doctor.evidence import NO_FOLDER, NO_PYTHON

CONNECT_SECONDS = 5
FOLDER_CODE, PYTHON_CODE = 91, 92
"""Exit codes of the command on the other side, where the folder or the interpreter is not there."""

Say = Callable[[str, str], None]
"""(host, line): takes what a host says while it works."""


class Unanswered(Exception):
    """A host gave no answer; the text says why, in the words of ssh where they are its."""


def ssh_command(host: str, environment: Mapping[str, str], ssh_options: Sequence[str] = ()) -> list[str]:
    """What starts a probe on a host, in the same folder and with the same interpreter as here: pdsh will expect both there.

    Args:
        host: a name that the hostfile's parser has let through.
        environment: variables that Python itself reads; the others are no business of a command line, which all may read.
        ssh_options: further words for ssh.
    """
    variables = [f"{name}={value}" for name, value in environment.items()]
    start = shlex.join(["env", *variables, *_probe_command()])
    there, python = shlex.quote(os.getcwd()), shlex.quote(sys.executable)
    words = f"cd {there} || exit {FOLDER_CODE}; test -x {python} || exit {PYTHON_CODE}; exec {start}"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *ssh_options]
    return ["ssh", "-T", *options, "--", host, words]


def local_command() -> list[str]:
    """What starts a probe here."""
    return _probe_command()


def _probe_command() -> list[str]:
    size = len(_source())
    return [sys.executable, "-u", "-c", f"import sys; exec(compile(sys.stdin.buffer.read({size}), 'probe', 'exec'))"]


def _source() -> bytes:
    return Path(probe.__file__).read_bytes()


class Host:
    """A probe that runs on a host until it is closed. Used by one thread at a time."""

    def __init__(
        self,
        name: str,
        slots: int,
        command: list[str],
        environment: Mapping[str, str],
        say: Say = lambda host, line: None,
    ) -> None:
        """Start it; nothing is waited for.

        Args:
            name: as in the hostfile.
            slots: processes that would run there.
            command: as `ssh_command` or `local_command` makes it.
            environment: variables that the launcher would send along.
            say: takes what the host says while it works.
        """
        self.name = name
        self.slots = slots
        self.lost: str | None = None
        """Why there are no answers (any more)."""
        self._say = say
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors: list[str] = []
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except FileNotFoundError:
            self.lost = f"{command[0]} is not installed on this machine"
            return
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._listener = threading.Thread(target=self._read_errors, daemon=True)
        self._listener.start()
        self._write(_source() + json.dumps(dict(environment)).encode() + b"\n")

    def hello(self, seconds: float) -> None:
        """Wait until the probe speaks; afterwards `lost` says why it does not."""
        if not self.lost:
            try:
                self._answer(seconds)
            except Unanswered as error:
                self.lost = str(error)

    def ask(self, question: str, seconds: float, /, **fields: Any) -> dict[str, Any]:
        """Ask a question of `probe.QUESTIONS` and wait for the answer.

        Raises:
            Unanswered: none came in time; the host is lost then.
        """
        if self.lost:
            raise Unanswered(self.lost)
        try:
            self._write(json.dumps({"ask": question, **fields}).encode() + b"\n")
            answer = self._answer(seconds)
            if "crashed" in answer:
                raise Unanswered(f"the probe's question `{question}` failed there: {answer['crashed']}")
            return answer
        except Unanswered as error:
            self.lost = str(error)
            raise

    def close(self) -> None:
        """End the probe with all that it started."""
        if not hasattr(self, "_process"):
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, raw: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it ended; `_answer` finds out why
            self._process.stdin.write(raw)
            self._process.stdin.flush()

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise Unanswered(f"no answer within {seconds:.0f} s{self._last_words()}") from None
        if answer is None:
            code = self._process.wait()
            self._listener.join(2)
            missing = {FOLDER_CODE: NO_FOLDER + os.getcwd(), PYTHON_CODE: NO_PYTHON + sys.executable}
            if code in missing:
                raise Unanswered(missing[code])
            raise Unanswered(self._last_words().lstrip(": ") or f"the connection ended, exit code {code}")
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace")
            if line.startswith(probe.MARK):
                fields = json.loads(line.removeprefix(probe.MARK))
                if "say" in fields:
                    self._say(self.name, fields["say"])
                else:
                    self._answers.put(fields)
        self._answers.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            line = raw.decode(errors="replace").strip()
            if line and not line.startswith("Warning: Permanently added"):
                self._errors.append(line)

    def _last_words(self) -> str:
        """What ssh (or the shell over there) said last, without the banner in front of it."""
        return ": " + " ".join(self._errors[-2:]) if self._errors else ""


def ask_all(
    hosts: Iterable[Host], question: str, seconds: float, fields: Callable[[Host], dict[str, Any]] = lambda host: {}
) -> dict[str, dict[str, Any]]:
    """Ask hosts at the same time.

    Returns:
        The answers, by name; hosts that gave none are left out, and say why in `lost`.
    """
    asked = [host for host in hosts if not host.lost]

    def ask(host: Host) -> dict[str, Any] | None:
        try:
            return host.ask(question, seconds, **fields(host))
        except Unanswered:
            return None

    with ThreadPoolExecutor(max(1, len(asked))) as askers:
        answers = list(askers.map(ask, asked))
    return {host.name: answer for host, answer in zip(asked, answers, strict=True) if answer is not None}


def clock_offset(host: Host, seconds: float) -> tuple[float, float]:
    """How far a host's clock is ahead of ours, and by how much that may be wrong, in seconds.

    Of several exchanges the quickest counts: the other clock was read somewhere between its two ends.

    Raises:
        Unanswered: no answer came.
    """
    best = (0.0, float("inf"))
    for _ in range(4):
        before, began = time.time(), time.monotonic()
        theirs = float(host.ask("time", seconds)["time"])
        took = time.monotonic() - began
        if took / 2 < best[1]:
            best = (theirs - (before + took / 2), took / 2)
    return best
