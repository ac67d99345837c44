"""Hosts for the tests that need more than one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hosts import Host, hosts, reason_to_skip


@pytest.fixture(scope="session", autouse=True)
def hosts_can_be_made() -> None:
    """Skip this folder, with the reason, where they cannot."""
    if reason := reason_to_skip():
        pytest.skip(reason)


@pytest.fixture
def make_hosts(tmp_path: Path) -> Iterator[Callable[[int], list[Host]]]:
    """Makes so many hosts, which are gone after the test."""
    with ExitStack() as stack:

        def make(count: int) -> list[Host]:
            folder = tmp_path / "cluster"
            folder.mkdir()
            return stack.enter_context(hosts(folder, count))

        yield make
