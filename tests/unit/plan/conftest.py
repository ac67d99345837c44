"""Plans for tests: a run file of any model, which nothing of is read but its config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_LLAMA, write_run

from ds_trainer.plan.cluster import Cluster
from ds_trainer.plan.story import Plan, Request, make_plan


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run file without a corpus."""

    def write(model: dict[str, Any] | None = None, base: Path | None = None, **sections: Any) -> Path:
        fields = {"path": str(base)} if base else {"config": model or TINY_LLAMA, "tokenizer": "not/read"}
        return write_run(tmp_path, tmp_path, model=fields, **sections)

    return write


@pytest.fixture
def plan_of(config_file: Callable[..., Path]) -> Callable[..., Plan]:
    """Plans a run file as `config_file` writes it."""

    def plan(*overrides: str, cluster: Cluster | None = None, **sections: Any) -> Plan:
        cluster = cluster or Cluster(nodes=1, ranks_per_node=2, device_type="cpu")
        return make_plan(Request(config=config_file(**sections), overrides=overrides, cluster=cluster))

    return plan
