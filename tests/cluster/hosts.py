"""Hosts on one machine: each has its own network, name, processes and mounts, and an sshd; a bridge joins them.

Made of Linux namespaces alone, so nothing outside is changed and nothing outlives this process: the first process of a host
dies with it, and the kernel ends whatever else ran there and takes the links away.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from helpers import ROOT, Done, run_command

NEEDED = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "nsenter": "util-linux"}
"""Commands, and the Debian packages that hold them."""
NETWORK = "10.77.0"
INTERFACE = "eth0"

CLIENT = """Host *
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    LogLevel ERROR
"""
SERVER = """HostKey {folder}/{name}_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/{name}.pid
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintMotd no
"""


def reason_to_skip() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "making hosts on one machine needs root"
    if missing := [f"{name} (package {package})" for name, package in NEEDED.items() if not shutil.which(name, path=_path())]:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """Owns one host: a process that all its namespaces belong to, and its sshd."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        """Make the namespaces; `hosts` gives the network.

        Args:
            name: of the host; what `hostname` says there.
            address: IPv4.
            folder: where keys and configs of all hosts lie.
        """
        self.name, self.address, self.folder = name, address, folder
        # With this thread the kernel ends unshare, which ends its child, the first process of the host, and so all others.
        spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
        waits = ["bash", "-c", "while :; do sleep 3600; done"]  # bash takes note of children that others left behind
        self._outer = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, *waits])
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.005)
        self.pid = int(found[0])
        while Path(f"/proc/{self.pid}/comm").read_text().strip() != "bash":  # until then --mount-proc may be still to come
            time.sleep(0.005)
        self.sh(f"hostname {name}; ip link set lo up")

    def inside(self, *command: str) -> list[str]:
        """The command that runs another one on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid", "--", *command]

    def sh(self, script: str) -> str:
        """Run a line of shell on this host, as root; what it printed."""
        done = subprocess.run(self.inside("bash", "-ec", script), capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{self.name}: {script}: {done.stderr}"
        return done.stdout

    def run(self, *command: str, cwd: Path, timeout: float = 120, env: dict[str, str] | None = None) -> Done:
        """Run a command of a user who sits at this host."""
        # nsenter starts in the root folder of the host's mounts.
        there = self.inside("env", "--chdir", str(cwd), *command)
        return run_command(there, cwd=cwd, timeout=timeout, env=env or environment())

    def mount(self, source: Path, over: Path) -> None:
        """Show a file or folder in the place of another one, on this host alone."""
        self.sh(f"mount --bind '{source}' '{over}'")

    def start_sshd(self, *settings: str, limits: str = ":") -> None:
        """Start sshd and wait until it takes connections.

        Args:
            settings: lines of sshd_config that come first, and so win.
            limits: shell that runs before it, such as `ulimit -n 256`.
        """
        config = self.folder / f"{self.name}.config"
        config.write_text("".join(f"{line}\n" for line in settings) + SERVER.format(folder=self.folder, name=self.name))
        self.sh(f"mkdir -p /run/sshd; {limits}; $(command -v sshd || echo /usr/sbin/sshd) -f {config}")

    def stop_sshd(self) -> None:
        """End the sshd; open connections stay."""
        self.sh(f"kill $(cat {self.folder / self.name}.pid)")

    def die(self) -> None:
        """The power fails."""
        self._outer.kill()
        self._outer.wait()


def environment(**extra: str) -> dict[str, str]:
    """Of a user who logged in on a host: nothing of a launcher, one thread a process."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TORCH_EXTENSIONS_DIR") if name in os.environ}
    return {**kept, "PATH": _path(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def _path() -> str:
    return f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@contextmanager
def hosts(folder: Path, count: int) -> Iterator[list[Host]]:
    """Make hosts node1, node2, ... that reach one another by name, with ssh and without a password.

    Args:
        folder: for keys and configs; every host sees it, as it sees all files of this machine.
        count: how many.
    """
    with ExitStack() as stack:
        made = [Host(f"node{number}", f"{NETWORK}.{number}", folder) for number in range(1, count + 1)]
        switch = Host("switch", f"{NETWORK}.254", folder)
        for host in (*made, switch):
            stack.callback(host.die)
        switch.sh("ip link add bridge type bridge; ip link set bridge up")
        known, table = [], ["127.0.0.1 localhost"]
        keys = [folder / f"{host.name}_key" for host in made]
        for key in (folder / "key", *keys):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        for host, key in zip(made, keys, strict=True):
            port = f"port_{host.name}"
            ends = f"{INTERFACE} netns {host.pid} type veth peer name {port} netns {switch.pid}"
            subprocess.run(["ip", "link", "add", *ends.split()], check=True)
            switch.sh(f"ip link set {port} master bridge up")
            host.sh(f"ip addr add {host.address}/24 dev {INTERFACE}; ip link set {INTERFACE} up")
            known.append(f"{host.name},{host.address} {key.with_suffix('.pub').read_text()}")
            table.append(f"{host.address} {host.name}")
        (folder / "known_hosts").write_text("".join(known))
        (folder / "authorized_keys").write_text((folder / "key.pub").read_text())
        (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
        (folder / "hosts").write_text("\n".join(table) + "\n")
        for host in made:
            host.mount(folder / "hosts", Path("/etc/hosts"))
            host.mount(folder / "ssh_config", Path("/etc/ssh/ssh_config"))
            host.sh("mount -t tmpfs tmpfs /run")
            host.start_sshd()
        yield made
