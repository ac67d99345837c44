"""Fixtures that several test folders share: a small corpus and run files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import write_corpus, write_run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, 60 texts of very different length, and 40 conversations."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def run_file(corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small run file into tmp_path; keyword arguments replace or extend its sections."""

    def write(name: str = "run", **sections: dict[str, Any] | None) -> Path:
        return write_run(corpus, tmp_path, name, **sections)

    return write


@pytest.fixture
def small_disk(tmp_path):
    """A disk that holds one checkpoint and no second one; it can be made larger."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
