"""The commands to copy: the user's own arguments under each accepted launcher."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

EXAMPLE_PROCESS_COUNT = 2
"""Processes in the commands where there is no GPU to count."""
RENDEZVOUS_PORT = 29500
"""Where the nodes meet; what torchrun and DeepSpeed take by themselves."""

_LOCAL_RANK_OPTION = re.compile(r"--local[_-]rank(=.*)?")
_DEBUG_OPTIONS = ("--config", "--deepspeed", "--set")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
_VALID_DEVICE = re.compile(r"\s*([0-9]+|(GPU|MIG)-\S+)\s*")
_MODULE = ("-m", "--module")
_SCRIPTS = ("torchrun", "deepspeed", "ds")
_HEAD_NODE = '"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Commands:
    """What the user asked for, written out as commands that a shell accepts as they stand."""

    arguments: tuple[str, ...] = ("train", "--config", "run.yaml")
    """Everything after the program name, subcommand first; a `--local_rank` that a launcher added is left out."""
    device_count: int | None = None
    """GPUs of this machine; None if they were not counted."""

    @property
    def process_count(self) -> int:
        """Processes per machine: one a GPU, or an example where there is none."""
        return self.device_count or EXAMPLE_PROCESS_COUNT

    def torchrun(self) -> str:
        """One machine, all its devices."""
        return self._torchrun()

    def deepspeed(self) -> str:
        """One machine, all its devices."""
        return f"deepspeed --num_gpus {self.process_count} --module ds_trainer {self._train()}"

    def deepspeed_hosts(self, hostfile: str = "HOSTFILE", *, through_pdsh: bool = True) -> str:
        """All machines of a hostfile, from one of them; what the remote shells of pdsh would expand is quoted for them."""
        train = ["train", *self._after_subcommand()]
        words = [for_remote_shell(word) for word in train] if through_pdsh else train
        return f"deepspeed --hostfile {shlex.quote(hostfile)} --module ds_trainer {shlex.join(words)}"

    def torchrun_nodes(self, nodes: int, first: str) -> str:
        """Several machines, the same command on each; they meet at the first one."""
        return self._torchrun(f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint {first}:{RENDEZVOUS_PORT}")

    def again(self, launcher: list[str]) -> str | None:
        """The command that started a launcher, with these arguments after the module; None where it is not of that form.

        Args:
            launcher: its command line in words, as the system shows it: an interpreter, a script or `-m module`, options.
        """
        at = next((at for at, word in enumerate(launcher) if word == "ds_trainer" and launcher[at - 1] in _MODULE), None)
        if at is None:
            return None
        script = Path(launcher[1]).name
        words = [script, *launcher[2 : at + 1]] if script in _SCRIPTS else launcher[: at + 1]
        return f"{shlex.join(words)} {self._train()}"

    def debug(self) -> str:
        """One process without a launcher; keeps the settings, drops what only `train` understands."""
        return f"ds_trainer debug {shlex.join(_settings_only(self._after_subcommand()))}".rstrip()

    def srun(self) -> str:
        """Every node of a SLURM job, one torchrun a node; for a batch script or a shell of `salloc`."""
        # --ntasks is spelled out because srun otherwise takes the job's own, one task a GPU as a rule.
        srun = 'srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
        nodes = f'--nnodes "$SLURM_JOB_NUM_NODES" --rdzv-backend c10d --rdzv-endpoint {_HEAD_NODE}:{RENDEZVOUS_PORT}'
        return f"{srun} {self._torchrun(nodes)}"

    def pods(self) -> str:
        """Every pod of an operator whose RANK and WORLD_SIZE count pods; to be the command of each pod."""
        nodes = '--nnodes "$WORLD_SIZE" --node-rank "$RANK"'
        return self._torchrun(f'{nodes} --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"')

    def _torchrun(self, *nodes: str) -> str:
        return " ".join(["torchrun", *nodes, f"--nproc-per-node {self.process_count} -m ds_trainer {self._train()}"])

    def _train(self) -> str:
        return shlex.join(["train", *self._after_subcommand()])

    def _after_subcommand(self) -> list[str]:
        own = list(_without_local_rank(self.arguments))
        return own[1:] if own and not own[0].startswith("-") else own


def visible_devices(environ: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """Count the NVIDIA devices this process may use, without importing torch.

    Args:
        environ: `CUDA_VISIBLE_DEVICES` decides if set; as in CUDA, the first invalid entry (empty, -1) ends the list.
        dev: the folder with the files nvidia0, nvidia1, ...
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return sum(re.fullmatch(r"nvidia[0-9]+", path.name) is not None for path in dev.glob("nvidia*"))
    count = 0
    for entry in listed.split(","):
        if not _VALID_DEVICE.fullmatch(entry):
            break
        count += 1
    return count


def for_remote_shell(word: str) -> str:
    """A word that arrives as it is after `deepspeed` has handed it to pdsh.

    Source: DeepSpeed 0.19.8, launcher/multinode_runner.py `parse_user_args`: a word with a blank is put in double quotes, any
    other one goes to the remote shell as it is.
    """
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def _without_local_rank(arguments: tuple[str, ...]) -> Iterator[str]:
    rest = iter(arguments)
    for argument in rest:
        match = _LOCAL_RANK_OPTION.fullmatch(argument)
        if match is None:
            yield argument
        elif match[1] is None:
            next(rest, None)


def _settings_only(arguments: list[str]) -> Iterator[str]:
    """The arguments that say what to run: `--config`, `--deepspeed`, `--set` with their values, and `key=value`."""
    rest = iter(arguments)
    for argument in rest:
        if argument in _DEBUG_OPTIONS:
            yield argument
            yield from itertools.islice(rest, 1)
        elif argument.startswith(tuple(f"{option}=" for option in _DEBUG_OPTIONS)) or _OVERRIDE.fullmatch(argument):
            yield argument
