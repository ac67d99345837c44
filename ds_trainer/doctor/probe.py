"""What runs on each host: answers questions about it, one line of JSON each, until its input ends.

`remote.py` sends this file's text through ssh and runs it there, so that a host whose ds_trainer is missing or of another
version answers too. Hence the standard library only, and nothing that Python 3.9 does not know. What may hang or crash (torch,
a driver, a compiler) runs in a process of its own with a time limit: a broken torch is an answer.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import glob
import hashlib
import importlib.util
import json
import os
import platform
import queue
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

MARK = "ds_trainer-doctor:"
"""Begins every line of ours: a login may print anything else."""
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "safetensors", "numpy", "bitsandbytes")
LEFTOVER = re.compile(
    r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|LOCAL_SIZE|MASTER_(ADDR|PORT)|CROSS_(RANK|SIZE)|"
    r"(TORCHELASTIC|ACCELERATE|OMPI_COMM_WORLD|PMI|PMIX|MV2_COMM_WORLD)_.*"
)
"""Variables that a launcher sets for its workers, and that have no business in a shell."""
DIAL_SECONDS = 3.0
SIOCGIFCONF = 0x8912
"""Asks for all IPv4 addresses with their interfaces: netdevice(7)."""
MAX_FILES = 2000
"""Of a path, files whose size is compared."""

_TORCH = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    usable = torch.cuda.is_available()
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "usable": usable, "devices": [], "nccl": None}
facts["why_not"] = None if usable else " ".join(str(each.message) for each in caught if "CUDA" in str(each.message))[:300]
if usable:
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts["devices"].append([properties.name, properties.total_memory])
print("MARK" + json.dumps(facts))
"""

_listeners: list[socket.socket] = []
_tokens: list[str] = []


def say(fields: dict[str, Any]) -> None:
    """Send one line to whoever asks."""
    print("\n" + MARK + json.dumps(fields), flush=True)


# --- who and what this host is ---


def facts(variables: list[str], port: int, torch_seconds: float) -> dict[str, Any]:
    """Everything about this host that needs no other host.

    Args:
        variables: those whose values are compared; only fingerprints leave the host.
        port: of the rendezvous.
        torch_seconds: what importing torch may take.
    """
    return {
        "host_name": socket.gethostname(),
        "machine": [_first_line("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/net")],
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
        "driver": _driver(),
        "torch": _in_python(_TORCH.replace("MARK", MARK), torch_seconds),
        "gpus": sum(re.fullmatch("nvidia[0-9]+", name) is not None for name in os.listdir("/dev")),
        "gpus_hidden": os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "code": _code(),
        "variables": {name: fingerprint(os.environ[name]) for name in variables if name in os.environ},
        "leftovers": sorted(name for name in os.environ if LEFTOVER.fullmatch(name)),
        "interfaces": interfaces(),
        "gloo_interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "infiniband": os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband")),
        "own_addresses": _own_addresses(),
        "first_address": _first_address(),
        "shm": _space("/dev/shm"),
        "limits": {
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
            "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK),
        },
        "unlimited": resource.RLIM_INFINITY,
        "port_owner": port_owner(port),
    }


def fingerprint(text: str) -> str:
    """Tells values apart without showing them: some are secrets."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _first_line(path: str) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as file:
        return file.readline().strip()
    return None


def _link(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except Exception:
        return None


def _driver() -> str | None:
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", _first_line("/proc/driver/nvidia/version") or "")
    return found.group(1) if found else None


def _code() -> dict[str, Any]:
    """Where ds_trainer is found, and the fingerprints of its files."""
    try:
        spec = importlib.util.find_spec("ds_trainer")
    except Exception:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return {"folder": None, "files": {}}
    root = next(iter(spec.submodule_search_locations))
    files = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "**", "*.py"), recursive=True)):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            files[os.path.relpath(path, root)] = hashlib.sha256(file.read()).hexdigest()[:12]
    return {"folder": root, "files": files}


def _space(path: str) -> dict[str, int] | None:
    with contextlib.suppress(OSError):
        stat = os.statvfs(path)
        return {"free": stat.f_bavail * stat.f_frsize, "size": stat.f_blocks * stat.f_frsize}
    return None


def _in_python(code: str, seconds: float) -> dict[str, Any]:
    """What a piece of Python answers in a process of its own; `error` when it crashes, fails or takes too long."""
    return _answer_of([sys.executable, "-c", code], seconds)


def _answer_of(command: list[str], seconds: float, progress: bool = False) -> dict[str, Any]:
    """The last line with our mark that a command prints, as JSON; lines of `progress` are handed on."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True
    )
    kept: list[str] = []
    errors = threading.Thread(target=lambda: kept.extend(child.stderr or []), daemon=True)
    errors.start()
    limit = threading.Timer(seconds, child.kill)
    limit.start()
    answer = None
    for line in child.stdout or []:
        if line.startswith(MARK):
            fields = json.loads(line[len(MARK) :])
            if progress and "say" in fields:
                say(fields)
            else:
                answer = dict(fields)
    code = child.wait()
    timed_out = not limit.is_alive()
    limit.cancel()
    errors.join(5)
    if answer is not None:
        return answer
    if timed_out:
        return {"error": f"no answer within {seconds:.0f} s"}
    last = [line.strip() for line in kept if line.strip()]
    by = f" (killed by signal {-code})" if code < 0 else ""
    return {"error": (last[-1][:300] if last else f"no word, exit code {code}") + by}


# --- the network ---


def interfaces() -> list[dict[str, Any]]:
    """Interfaces that are up, with the addresses they have."""
    found = []
    room = array.array("B", bytes(40 * 256))  # a `struct ifreq` each
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as box:
        request = struct.pack("iL", len(room), room.buffer_info()[0])
        size = struct.unpack("iL", fcntl.ioctl(box, SIOCGIFCONF, request))[0]
        for start in range(0, size, 40):
            entry = room[start : start + 40].tobytes()
            name = entry[:16].partition(b"\0")[0].decode().partition(":")[0]
            address = socket.inet_ntoa(entry[20:24])
            found.append({"name": name, "address": address, "loopback": name == "lo"})
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as file:
        for line in file:
            digits, _, _, scope, _, name = line.split()
            if scope == "00":  # global
                address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
                found.append({"name": name, "address": address, "loopback": False})
    return found


def _own_addresses() -> list[str]:
    """What this host's own name resolves to, in the order gloo tries it; empty when it does not resolve."""
    with contextlib.suppress(OSError):
        answers = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(answer[4][0]) for answer in answers))
    return []


def _first_address() -> str | None:
    """What `deepspeed` takes for the address of rank zero when this is the first host (launcher/runner.py, `hostname -I`)."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["hostname", "-I"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5, check=False)
        words = done.stdout.decode(errors="replace").split()
        return words[0] if words else None
    return None


def port_owner(port: int) -> dict[str, Any] | None:
    """Who listens on a TCP port, and a port next to it that is free; None when it is free."""
    if _is_free(port):
        return None
    free = next((other for other in range(port + 1, port + 200) if _is_free(other)), None)
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as file:
            for line in list(file)[1:]:
                words = line.split()
                if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:  # TCP_LISTEN
                    inodes.add(f"socket:[{words[9]}]")
    for path in glob.glob("/proc/[0-9]*/fd/*"):
        if _link(path) in inodes:
            pid = path.split("/")[2]
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                return {
                    "pid": int(pid),
                    "command": " ".join(file.read().replace(b"\0", b" ").decode(errors="replace").split())[:80],
                    "free": free,
                }
    return {"pid": None, "command": None, "free": free}


def _is_free(port: int) -> bool:
    box = _bound(port)
    if box is not None:
        box.close()
    return box is not None


def _bound(port: int) -> socket.socket | None:
    """A socket bound to the port on all addresses, IPv6 too where there is any; None when somebody has it."""
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    try:
        box = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        box = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    box.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if box.family == socket.AF_INET6:
            box.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        box.bind(("", port))
        box.listen(128)
    except OSError:
        box.close()
        return None
    return box


def listen(port: int, token: str) -> dict[str, Any]:
    """Listen on the port (0: any) and on one more of the system's choice, and tell whoever calls who is here."""
    ports = []
    for number in (port, 0):
        box = _bound(number)
        ports.append(box.getsockname()[1] if box else None)
        if box:
            _listeners.append(box)
            threading.Thread(target=_greet, args=(box, token.encode()), daemon=True).start()
    return {"rendezvous": ports[0], "other": ports[1]}


def _greet(box: socket.socket, token: bytes) -> None:
    with contextlib.suppress(OSError):
        while True:
            caller, _ = box.accept()
            with contextlib.suppress(OSError), caller:
                caller.sendall(token)


def dial(calls: list[list[Any]]) -> dict[str, Any]:
    """Call [address, port, token] each.

    Returns:
        For each call: "ok", "someone else" (no token or another's), "refused", "no answer", or the system's word.
    """
    with ThreadPoolExecutor(64) as callers:
        return {"results": list(callers.map(lambda call: _call(*call), calls))}


def _call(address: str, port: int, token: str) -> str:
    try:
        with socket.create_connection((address, port), timeout=DIAL_SECONDS) as box:
            greeting = b""
            with contextlib.suppress(OSError):
                greeting = box.recv(200)
            return "ok" if greeting == token.encode() else "someone else"
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return "no answer" if "timed out" in str(error) else error.strerror or str(error)


def unlisten() -> dict[str, Any]:
    """Give the ports back."""
    while _listeners:
        box = _listeners.pop()
        with contextlib.suppress(OSError):
            box.shutdown(socket.SHUT_RDWR)
        box.close()
    return {}


# --- files ---


def paths(paths: list[str]) -> dict[str, Any]:
    """What is found under each path (or glob): files, bytes, a fingerprint of names and sizes, and what cannot be read."""
    return {"paths": {path: _look_at(path) for path in paths}}


def _look_at(path: str) -> dict[str, Any]:
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        return {"found": False}
    files: list[tuple[str, int]] = []
    for name in _files(found):
        try:
            with open(name, "rb") as file:
                file.read(1)
            files.append((name, os.stat(name).st_size))
        except OSError as error:
            return {"found": True, "error": f"{name}: {error.strerror}"}
        if len(files) == MAX_FILES:
            break
    digest = fingerprint(json.dumps(files))
    return {"found": True, "files": len(files), "bytes": sum(size for _, size in files), "digest": digest}


def _files(found: list[str]) -> Iterator[str]:
    for path in found:
        if not os.path.isdir(path):
            yield path
            continue
        with os.scandir(path):  # raises where a folder cannot be read; os.walk would skip it without a word
            pass
        for folder, names, files in os.walk(path):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(files):
                if not name.startswith("."):
                    yield os.path.join(folder, name)


def leave_token(folder: str, name: str) -> dict[str, Any]:
    """Write a file into the run folder, which is made for as long as that takes.

    Returns:
        Free bytes there, and how many complete checkpoints it holds.
    """
    made: list[str] = []
    try:
        missing = os.path.abspath(folder)
        while not os.path.isdir(missing):
            made.append(missing)
            missing = os.path.dirname(missing)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, name)
        with open(path, "w", encoding="ascii") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
        _tokens.append(path)
    except OSError as error:
        return {"error": f"{error.filename or folder}: {error.strerror}"}
    finally:
        _tokens.extend(made)
    held = glob.glob(os.path.join(glob.escape(folder), "checkpoints", "step_*"))
    return {"space": _space(folder), "checkpoints": len(held), "file_system": _file_system(folder)}


def see_tokens(folder: str, names: list[str], seconds: float) -> dict[str, Any]:
    """Which of the files are there; a network file system may need a moment."""
    deadline = time.monotonic() + seconds
    while True:
        seen = [name for name in names if os.path.exists(os.path.join(folder, name))]
        if len(seen) == len(names) or time.monotonic() > deadline:
            return {"seen": seen}
        time.sleep(0.1)


def remove_tokens() -> dict[str, Any]:
    """Leave no trace: our file, and the folders that were made for it, where nobody else has put anything into them."""
    for path in list(_tokens):
        with contextlib.suppress(OSError):
            if os.path.isdir(path):
                os.rmdir(path)
            else:
                os.unlink(path)
            _tokens.remove(path)
    return {}


def _file_system(folder: str) -> str:
    """Type and source of the file system a folder lies on, as in /proc/mounts."""
    best, words = "", "?"
    with contextlib.suppress(OSError), open("/proc/mounts", encoding="utf-8", errors="replace") as file:
        for line in file:
            source, where, kind = line.split()[:3]
            inside = (os.path.realpath(folder) + "/").startswith(where.rstrip("/") + "/")
            if inside and len(where) >= len(best):
                best, words = where, f"{kind} on {source}"
    return words


# --- work ---


def run_module(module: str, arguments: list[str], seconds: float) -> dict[str, Any]:
    """Run a module of ds_trainer and hand on what it says."""
    return _answer_of([sys.executable, "-m", module, *arguments], seconds, progress=True)


def run_ranks(
    module: str, arguments: list[str], first_rank: int, count: int, world_size: int, address: str, port: int, seconds: float
) -> dict[str, Any]:
    """Start ranks of a module as a launcher would, and wait for all of them.

    Returns:
        `answer` of rank zero, if it ran here; and `failed`: [rank, last words] of those that did not end well.
    """

    def run(local: int) -> dict[str, Any]:
        environment = [
            f"RANK={first_rank + local}",
            f"LOCAL_RANK={local}",
            f"WORLD_SIZE={world_size}",
            f"MASTER_ADDR={address}",
            f"MASTER_PORT={port}",
            f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '1')}",
        ]
        return _answer_of(["env", *environment, sys.executable, "-m", module, *arguments], seconds, progress=True)

    with ThreadPoolExecutor(count) as waiters:
        answers = list(waiters.map(run, range(count)))
    failed = [[first_rank + local, answer["error"]] for local, answer in enumerate(answers) if "error" in answer]
    return {"answer": answers[0] if first_rank == 0 and not failed else None, "failed": failed}


# --- the conversation ---

QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        facts,
        listen,
        dial,
        unlisten,
        paths,
        leave_token,
        see_tokens,
        remove_tokens,
        run_module,
        run_ranks,
    )
}


def converse() -> None:
    """Answer until the input ends; then end at once, with everything that was started."""
    if os.getpgrp() != os.getpid():
        os.setsid()
    os.environ.update(json.loads(sys.stdin.buffer.readline()))
    questions: queue.Queue = queue.Queue()

    def read() -> None:
        for line in sys.stdin.buffer:
            questions.put(line)
        remove_tokens()
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    say({"hello": True})
    while True:
        fields = json.loads(questions.get())
        if fields["ask"] == "time":
            say({"time": time.time()})
            continue
        try:
            answer = QUESTIONS[fields.pop("ask")](**fields)
        except Exception as error:
            answer = {"crashed": f"{type(error).__name__}: {error}"}
        say(answer)


if __name__ == "__main__":
    converse()
