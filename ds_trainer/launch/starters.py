"""All that can have started this process, in the order in which their marks must be looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ds_trainer.launch.commands import Commands

CORE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed and DeepSpeed read, whoever set it."""

SLURM_SHELL_STEPS = ("4294967290", "4294967291")
"""SLURM_STEP_ID of an interactive shell of `salloc` and of a batch script. Source: SLURM_INTERACTIVE_STEP and
SLURM_BATCH_SCRIPT in slurm.h."""

Variables = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Starter:
    """One way to start a process, and how it is told from the others."""

    words: str
    """Completes "This process was ..."."""
    applies: Callable[[Variables], bool]
    """Whether its marks are among the variables."""
    shows: tuple[str, ...]
    """Variables, or patterns of them, that prove it: the most telling first."""
    rule: str
    """Why it is refused, or for an accepted launcher, what its variables must keep to."""
    launcher: Literal["torchrun", "deepspeed"] | None = None
    """Its name if it is accepted."""
    sets: tuple[str, ...] = ()
    """Variables it sets in every process. Missing and contradictory ones are named in the refusal."""
    rank: str = ""
    """The variable that numbers its processes from 0, if every process it starts has one."""
    sizes: tuple[str, ...] = ()
    """Variables that count its processes; the first one set is right."""
    leftover: bool = False
    """Whether its variables often survive in a shell, so that the user may have to unset them."""
    commands: tuple[Callable[[Commands], str], ...] = (Commands.torchrun, Commands.deepspeed, Commands.debug)
    """What to start instead."""


def all_set(*names: str) -> Callable[[Variables], bool]:
    """A test for marks that only count together."""
    return lambda variables: all(name in variables for name in names)


def any_set(*patterns: str) -> Callable[[Variables], bool]:
    """A test for marks of which one is enough."""
    return lambda variables: bool(matching(variables, patterns))


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that match a pattern, in the order of the patterns, each once."""
    ordered = sorted(names)
    return list(dict.fromkeys(name for pattern in patterns for name in ordered if fnmatchcase(name, pattern)))


is_torchrun = any_set("TORCHELASTIC_RUN_ID")
is_deepspeed = any_set("CROSS_RANK", "CROSS_SIZE")
is_openmpi = any_set("OMPI_COMM_WORLD_RANK")


def is_srun(variables: Variables) -> bool:
    """Whether this is a task of an srun step; a batch script and a shell of `salloc` carry the same variables."""
    return all_set("SLURM_STEP_ID", "SLURM_PROCID")(variables) and variables["SLURM_STEP_ID"] not in SLURM_SHELL_STEPS


_MPI_RULE = (
    "ds_trainer trains under torchrun or deepspeed (one node, or pdsh) only: MPI leaves RANK, LOCAL_RANK, WORLD_SIZE and "
    "MASTER_ADDR to be guessed through mpi4py."
)

_ACCEPTED_RULE = (
    "The launcher sets these variables together, in every worker. Some were changed or removed since, or they are "
    "left over from another job."
)

STARTERS: tuple[Starter, ...] = (
    # accelerate first: underneath, it uses torchrun or deepspeed and leaves their marks as well.
    Starter(
        words="started by `accelerate launch`",
        applies=any_set("ACCELERATE_*"),
        shows=("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_*", *CORE[:3], "ACCELERATE_*"),
        rule=(
            "ds_trainer trains under torchrun or deepspeed only: accelerate hands the libraries its own precision and "
            "DeepSpeed settings, behind the run file's back. If accelerate took no part in this start, look for a "
            ".deepspeed_env here and at home: accelerate writes its variables there, and deepspeed sends them to all "
            "workers under pdsh."
        ),
        sizes=("WORLD_SIZE",),
        leftover=True,
    ),
    Starter(
        words="started by `torchrun` and `deepspeed`, one inside the other",
        applies=lambda variables: is_torchrun(variables) and is_deepspeed(variables),
        shows=("TORCHELASTIC_RUN_ID", "CROSS_RANK", "CROSS_SIZE", "RANK", "ROLE_RANK", "WORLD_SIZE", "ROLE_WORLD_SIZE"),
        rule="Exactly one launcher may start the workers: of two, nobody can tell whose RANK and WORLD_SIZE are in force.",
        sizes=("WORLD_SIZE",),
        leftover=True,
    ),
    Starter(
        words="started by `torchrun` or `deepspeed` inside `mpirun` (Open MPI)",
        applies=lambda variables: is_openmpi(variables) and (is_torchrun(variables) or is_deepspeed(variables)),
        shows=("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", *CORE[:3], "TORCHELASTIC_RUN_ID", "CROSS_RANK"),
        rule=(
            "DeepSpeed stops when OMPI_COMM_WORLD_LOCAL_RANK, which mpirun sets, differs from LOCAL_RANK. "
            "Start the launcher on each node by ssh, pdsh or srun."
        ),
    ),
    Starter(
        words="started by `torchrun`",
        applies=is_torchrun,
        shows=(*CORE, "LOCAL_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "GROUP_*", "TORCHELASTIC_RUN_ID"),
        rule=_ACCEPTED_RULE,
        launcher="torchrun",
        sets=(*CORE, "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE"),
        rank="RANK",
        sizes=("WORLD_SIZE",),
    ),
    Starter(
        words="started by `deepspeed`",
        applies=is_deepspeed,
        shows=(*CORE, "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
        rule=_ACCEPTED_RULE,
        launcher="deepspeed",
        sets=(*CORE, "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
        rank="RANK",
        sizes=("WORLD_SIZE",),
    ),
    # The MPI families stand around srun on purpose: mpirun may reach its nodes through srun and then shows a step, too;
    # and srun's PMI plugins set PMI_RANK and PMIX_RANK, but never the three marks above it.
    Starter(
        words="started by `mpirun` (Open MPI) or `deepspeed --launcher openmpi`",
        applies=is_openmpi,
        shows=("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", *CORE[:3]),
        rule=_MPI_RULE,
        rank="OMPI_COMM_WORLD_RANK",
        sizes=("OMPI_COMM_WORLD_SIZE",),
    ),
    Starter(
        words="started by `mpirun_rsh` (MVAPICH) or `deepspeed --launcher mvapich`",
        applies=any_set("MV2_COMM_WORLD_RANK"),
        shows=("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", *CORE[:3]),
        rule=_MPI_RULE,
        rank="MV2_COMM_WORLD_RANK",
        sizes=("MV2_COMM_WORLD_SIZE",),
    ),
    Starter(
        words="started by `mpiexec` (MPICH, Intel MPI) or `deepspeed --launcher mpich` or `impi`",
        applies=any_set("MPI_LOCALRANKID"),
        shows=("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", *CORE[:3]),
        rule=_MPI_RULE,
        rank="PMI_RANK",
        sizes=("PMI_SIZE",),
    ),
    Starter(
        words="started by `srun` or `deepspeed --launcher slurm`",
        applies=is_srun,
        shows=("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", *CORE[:3]),
        rule=(
            "ds_trainer trains under torchrun or deepspeed only: srun gives its tasks no RANK, LOCAL_RANK, WORLD_SIZE and "
            "MASTER_ADDR. Let srun start one torchrun a node, and torchrun the workers."
        ),
        rank="SLURM_PROCID",
        sizes=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        commands=(Commands.srun, Commands.torchrun, Commands.deepspeed, Commands.debug),
    ),
    Starter(
        words="started by an MPI launcher (PMI)",
        applies=lambda variables: "PMI_RANK" in variables and "SLURM_STEP_ID" not in variables,
        shows=("PMI_RANK", "PMI_SIZE", *CORE[:3]),
        rule=_MPI_RULE,
        rank="PMI_RANK",
        sizes=("PMI_SIZE",),
    ),
    Starter(
        words="started by an MPI launcher (PMIx)",
        applies=lambda variables: "PMIX_RANK" in variables and "SLURM_STEP_ID" not in variables,
        shows=("PMIX_RANK", "PMIX_NAMESPACE", "PMIX_HOSTNAME", *CORE[:3]),
        rule=_MPI_RULE,
        rank="PMIX_RANK",
    ),
    Starter(
        words="started inside Ray",
        applies=any_set("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_NODE_ID", "RAY_ADDRESS"),
        shows=("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_NODE_ID", "RAY_ADDRESS", *CORE[:3]),
        rule="Ray places and restarts workers by its own rules. Let a Ray job run the launcher as its entry point instead.",
    ),
    Starter(
        words="started by a Kubernetes operator without torchrun",
        applies=any_set("PET_*"),
        shows=("PET_NNODES", "PET_NODE_RANK", "PET_NPROC_PER_NODE", "PET_RDZV_BACKEND", *CORE[:3]),
        rule="The PET_* variables are settings for torchrun, which reads them itself. Let the pod run torchrun.",
        commands=(Commands.torchrun, Commands.debug),
    ),
    Starter(
        words="started by a Kubernetes operator, which set RANK or WORLD_SIZE itself",
        applies=lambda variables: (
            "KUBERNETES_SERVICE_HOST" in variables and any_set("RANK", "LOCAL_RANK", "WORLD_SIZE")(variables)
        ),
        shows=("KUBERNETES_SERVICE_HOST", *CORE),
        rule="There, RANK and WORLD_SIZE count pods, not processes. Let each pod run one torchrun, and torchrun the workers.",
        commands=(Commands.pods, Commands.debug),
    ),
    Starter(
        words="started by no known launcher, with rank variables that are left over or set by hand",
        applies=any_set("RANK", "LOCAL_RANK", "WORLD_SIZE"),
        shows=(*CORE, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK"),
        rule="RANK and WORLD_SIZE alone do not prove that the other ranks exist. Let torchrun or deepspeed set them.",
        sets=CORE,
        leftover=True,
    ),
    Starter(
        words="started by plain python, without a launcher",
        applies=lambda variables: True,
        shows=(),
        rule="Training runs under torchrun or deepspeed, also on one GPU; only `debug` runs without.",
    ),
)


def identify(variables: Variables) -> Starter:
    """The first starter whose marks are there; the last one, plain python, always is."""
    return next(starter for starter in STARTERS if starter.applies(variables))
