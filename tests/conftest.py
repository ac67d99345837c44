"""Fixtures that several test folders share: a small corpus and run files."""

from __future__ import annotations

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
