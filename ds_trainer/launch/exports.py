"""Which variables of this shell reach the workers when `deepspeed` starts them through pdsh. Pure, but for reading two files.

Source: deepspeed 0.19.8, launcher/runner.py (`EXPORT_ENVS`, `main`) and launcher/multinode_runner.py (`add_export`).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

COMMON_VARIABLES = (
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "DS_ACCELERATOR",
)
"""Of the environment, what decides how ranks talk or what they compute. Interfaces and devices may differ from host to host."""
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""What begins like this is sent along; NCCL only where the launcher finds a GPU, but without GPUs it means nothing."""
LOST = {
    "HF_*": "where models and data sets are found, and the right to fetch them",
    "HUGGINGFACE_*": "where models and data sets are found, and the right to fetch them",
    "TRANSFORMERS_*": "where models are found",
    "WANDB_*": "where the tracker reports, and the right to",
    "COMET_*": "where the tracker reports, and the right to",
    "PYTORCH_*": "how torch allocates memory",
    "TORCH_*": "how torch computes, and where ops are built",
    "GLOO_*": "the interface that gloo talks through",
    "CUBLAS_*": "what the GPUs compute",
    "NVIDIA_TF32_OVERRIDE": "what the GPUs compute",
    "CUDA_HOME": "which CUDA ops are built with",
    "CUDA_PATH": "which CUDA ops are built with",
    "CC": "which compiler builds ops",
    "CXX": "which compiler builds ops",
    "TRITON_*": "where kernels are built",
    "DS_ACCELERATOR": "what DeepSpeed takes for the device",
    "DEEPSPEED_*": "how long DeepSpeed waits",
    "LD_LIBRARY_PATH": "which libraries are loaded",
    "OMP_NUM_THREADS": "how many threads a rank has",
    "XDG_CACHE_HOME": "where models are found",
    "http_proxy": "how the hub is reached",
    "https_proxy": "how the hub is reached",
    "no_proxy": "how the hub is reached",
}
"""Variables that matter to a run, as patterns, and for what."""
ONLY_WARNED = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS", "XDG_CACHE_HOME", "*_proxy", "CC", "CXX")
"""Of them, those that a host often rightly sets for itself, or that slow a run down at most."""
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EXPANDED = re.compile(r'["$`\\\n]')
"""What means something to a shell inside double quotes, which is all that DeepSpeed puts around a value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exports:
    """What the workers' shells are given."""

    variables: Mapping[str, str] = field(default_factory=dict)
    """As they were meant."""
    problems: tuple[tuple[str, str, str], ...] = ()
    """What is wrong with them: (where, what was found, what to do)."""


def read_exports(environ: Mapping[str, str], home: Path, folder: Path) -> Exports:
    """What `deepspeed --hostfile`, started in a folder, sends along.

    Args:
        environ: of the shell it is started in.
        home: the user's home.
        folder: the current one.
    """
    variables = {name: value for name, value in environ.items() if name.startswith(EXPORTED)}
    problems = [
        (f"${name}", _what_a_shell_sees(value), f"unset {name}, or give it a value without these characters")
        for name, value in sorted(variables.items())
        if _EXPANDED.search(value)
    ]
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in dict.fromkeys((home / name, folder / name)):
        if path.is_file():
            if path.stat().st_mode & stat.S_IWOTH:
                problems.append((str(path), "anybody may write it, and a shell on every host runs it", f"chmod o-w {path}"))
            found, wrong = parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
            variables.update(found)
            problems += wrong
    return Exports(variables=variables, problems=tuple(problems))


def parse(text: str, where: str) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """The lines of a .deepspeed_env: the variables, and (file:line, what was found, what to do) for what is wrong."""
    variables, problems = {}, []
    for number, line in enumerate(text.splitlines(), start=1):
        name, equals, value = line.partition("=")
        name, value = name.strip(), value.strip()
        here = f"{where}:{number}"
        # By what a line holds, not by its number: numbers move with the first line that goes.
        remove = f"keep what is NAME=value: sed -i -E '/^\\s*[A-Za-z_]\\w*\\s*=/!d; /^\\s*ACCELERATE_/d' {where}"
        if not equals:
            kind = "blank" if not line.strip() else f"`{line.strip()[:40]}`, without `=`"
            problems.append((here, f"{kind}: DeepSpeed 0.19.8 stops with a ValueError", remove))
        elif name.startswith("ACCELERATE_"):
            problems.append((here, f"{name}: accelerate wrote it; `train` would take accelerate for its launcher", remove))
        elif not _NAME.fullmatch(name):
            problems.append((here, f"`{name[:40]}` is no name of a variable: every host's shell reads it as a command", remove))
        else:
            variables[name] = value
            if _EXPANDED.search(value):
                problems.append((here, f"{name}: {_what_a_shell_sees(value)}", "give it a value without these characters"))
    return variables, problems


def _what_a_shell_sees(value: str) -> str:
    found = sorted(set(_EXPANDED.findall(value)))
    return (
        f"the value holds {' '.join(map(repr, found))}, which every host's shell expands: DeepSpeed puts double quotes around"
    )


def that_matter(environ: Mapping[str, str]) -> dict[str, str]:
    """Of a shell's variables those that change what a run does, with what they decide."""
    found = {}
    for name in sorted(environ):
        for pattern, why in LOST.items():
            if fnmatchcase(name, pattern):
                found[name] = why
                break
    return found
