"""DeepSpeed's C++ ops: build them with a word to the user, and explain what is missing instead of a stack trace.

An op is compiled by the first process that needs it and kept in TORCH_EXTENSIONS_DIR. torch guards the build with a file named
`lock`, which a killed build leaves behind and the next process then waits for without a word, for ever.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ds_trainer.errors import BuildError

_BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "fused_adam": "FusedAdamBuilder",
    "async_io": "AsyncIOBuilder",
    "cpu_lion": "CPULionBuilder",
    "fused_lion": "FusedLionBuilder",
    "fused_lamb": "FusedLambBuilder",
    "cpu_adagrad": "CPUAdagradBuilder",
}
_NEEDED_BY = {
    "cpu_adam": "optimizer offload (zero_optimization.offload_optimizer)",
    "fused_adam": "DeepSpeed's fused AdamW on the GPU",
    "async_io": "offload to nvme",
}
_FOR_GPU = ("fused_adam", "fused_lion", "fused_lamb")
STALE_SECONDS = 20 * 60
"""A build takes one to three minutes; a lock of this age belongs to a process that died."""


def build_op(name: str, report: Callable[[str], None]) -> None:
    """Compile one of DeepSpeed's ops, or load it if that was done before. One process a host compiles, the others wait.

    Args:
        name: `cpu_adam`, `fused_adam`, `async_io`, or what else `arguments.engine_config.needed_ops` names.
        report: takes a line for the user.

    Raises:
        BuildError: a compiler or library is missing, or the compiler failed; with what to install.
    """
    builder = _builder(name)
    folder = _build_folder(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        built = any(folder.glob("*.so"))
        if not built:
            # Every rank says so before it waits for the one that builds: only rank zero's words are shown.
            _require_tools(name, builder)
            report(f"building DeepSpeed's op {name} for {_needed_by(name)}; this takes some minutes and happens once")
        with open(folder.parent / f"{name}.ds_trainer.lock", "w") as lock:
            # The kernel releases this lock with its owner, so unlike torch's it cannot go stale.
            fcntl.flock(lock, fcntl.LOCK_EX)
            _remove_stale_lock(folder, report)
            started = time.monotonic()
            builder.load(verbose=False)
            if not built:
                report(f"built {name} in {time.monotonic() - started:.0f} s ({folder})")
    except BuildError:
        raise
    except OSError as error:
        raise BuildError(
            f"DeepSpeed's op {name} cannot be built in {folder.parent} ({error.strerror or error}). "
            "Set TORCH_EXTENSIONS_DIR to a folder you can write to."
        ) from None
    except Exception as error:  # torch raises RuntimeError and CalledProcessError with the compiler's output in it
        text = str(error)
        cause = next((line.strip() for line in text.splitlines() if "error:" in line), text.strip().split("\n")[0])
        raise BuildError(
            f"DeepSpeed's op {name}, needed for {_needed_by(name)}, could not be built: {cause[:300]}. "
            f"The compiler's output is in this rank's log. {_advice(name)}"
        ) from error


def why_not(name: str) -> str | None:
    """Why one of DeepSpeed's ops can be neither loaded nor compiled here; None when it can, as far as that can be seen."""
    builder = _builder(name)
    if not any(_build_folder(name).glob("*.so")):
        try:
            _require_tools(name, builder)
        except BuildError as error:
            return str(error)
    return None


def examine_op(name: str) -> dict[str, Any]:
    """What this host has of an op, as JSON: whether it is built, what a build would lack, and a lock in its way."""
    folder = _build_folder(name)
    on_gpu = name in _FOR_GPU and torch.version.cuda is not None
    return {
        "op": name,
        "folder": str(folder),
        "built": any(folder.glob("*.so")),
        "lacks": why_not(name),
        "stale_lock_seconds": _age_of_stale_lock(folder / "lock"),
        "compiler": next(iter(_output_of(os.environ.get("CXX") or "c++", "--version").splitlines()), None),
        "nvcc": _cuda_of_nvcc() if on_gpu else None,
        "torch_cuda": torch.version.cuda if on_gpu else None,
    }


def _cuda_of_nvcc() -> str | None:
    """Version of the CUDA toolkit that would build an op, such as 12.8; None when there is none."""
    from torch.utils.cpp_extension import CUDA_HOME

    found = re.search(r"release (\d+\.\d+)", _output_of(f"{CUDA_HOME}/bin/nvcc", "--version"))
    return found[1] if found else None


def _output_of(*command: str) -> str:
    """What a program prints; nothing when it cannot be started."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _builder(name: str) -> Any:
    # ninja comes with DeepSpeed into the environment's bin folder, which is on PATH only when the environment is active.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    return getattr(importlib.import_module("deepspeed.ops.op_builder"), _BUILDERS[name])()


def _needed_by(name: str) -> str:
    return _NEEDED_BY.get(name, "the optimizer that the DeepSpeed JSON names")


def _build_folder(name: str) -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, verbose=False))


def _remove_stale_lock(folder: Path, report: Callable[[str], None]) -> None:
    lock = folder / "lock"
    age = _age_of_stale_lock(lock)
    if age is not None:
        lock.unlink(missing_ok=True)
        report(f"removed a build lock that a killed process left behind {age / 60:.0f} min ago ({lock})")


def _age_of_stale_lock(lock: Path) -> float | None:
    """Seconds since a killed build left its lock behind; None when there is none, or somebody builds."""
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
    return age if age > STALE_SECONDS or not _someone_builds(lock.parent) else None


def _someone_builds(folder: Path) -> bool:
    """Whether a compiler or ninja of this user works in the folder right now."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve():
                return True
        except OSError:
            continue
    return False


def _require_tools(name: str, builder: Any) -> None:
    compiler = os.environ.get("CXX", "c++")
    if not (shutil.which(compiler) or shutil.which("g++")):
        raise BuildError(f"DeepSpeed's op {name} needs a C++ compiler, and `{compiler}` was not found. {_advice(name)}")
    if not shutil.which("ninja"):
        raise BuildError(f"DeepSpeed's op {name} needs ninja, which was not found. Install it: pip install ninja")
    if name == "async_io" and not builder.is_compatible(verbose=False):
        raise BuildError(f"offload to nvme needs libaio and its header, which were not found. {_advice(name)}")


def _advice(name: str) -> str:
    if name == "async_io":
        return "Install them: apt-get install g++ libaio-dev (or dnf install gcc-c++ libaio-devel)."
    if name.startswith("cpu_") and name != "cpu_adam":
        return "Install a compiler: apt-get install g++ (or dnf install gcc-c++)."
    if name == "cpu_adam":
        return (
            "Install a compiler: apt-get install g++ (or dnf install gcc-c++); or do without: "
            '"optimizer": {"type": "AdamW", "params": {"torch_adam": true}} in the DeepSpeed JSON.'
        )
    toolkit = f"Install g++ and a CUDA toolkit of torch's version ({torch.version.cuda or 'none'})"
    if name != "fused_adam":
        return f"{toolkit}."
    return (
        f'{toolkit}; or do without: "optimizer": {{"type": "AdamW", "params": {{"torch_adam": true}}}} in the DeepSpeed JSON.'
    )
