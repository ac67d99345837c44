"""Before the first step, all ranks compare what they are about to run: ranks that differ would hang, or train to no purpose."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from ds_trainer import __version__, comm
from ds_trainer.arguments.report import flatten, resolved_as_json
from ds_trainer.assemble import Prepared
from ds_trainer.errors import DisagreementError
from ds_trainer.launch.exports import COMMON_VARIABLES
from ds_trainer.monitor.metrics import as_ranges

_SHOWN_ROWS, _SHOWN_VALUE = 8, 60
_ABSENT = "(not there)"


def require_agreement(prepared: Prepared) -> None:
    """Refuse ranks that would train different runs. Collective.

    Raises:
        DisagreementError: with a table of what differs and on which ranks.
    """
    facts = facts_of(prepared)
    everyone = comm.gather_objects((socket.gethostname(), {name: digest(value) for name, value in facts.items()}))
    names = [name for name in facts if len({digests[name] for _, digests in everyone}) > 1]
    if names:
        # Only now in full: the settings and a model's config are long.
        differing = comm.gather_objects({name: facts[name] for name in names})
        raise DisagreementError(disagreement([host for host, _ in everyone], differing))


def facts_of(prepared: Prepared) -> dict[str, Any]:
    """What all ranks must have in common, by name; as JSON."""
    tokenizer = prepared.data.tokenizer
    packages = ["torch", "deepspeed", "transformers", "peft", "numpy"]
    if prepared.resolved.settings.model.quantize:
        packages.append("bitsandbytes")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "settings": {path: each["value"] for path, each in resolved_as_json(prepared.resolved).items()},
        "engine config": prepared.engine_config.config,
        "model config": prepared.model_config.to_dict(),
        "data": prepared.data.fingerprint,
        "held-out data": {name: rows.fingerprint for name, rows in prepared.data.held_out.items()},
        "tokenizer": digest([len(tokenizer), backend.to_str() if backend else tokenizer.get_vocab()]),
        "version of python": platform.python_version(),
        "version of ds_trainer": __version__,
        **{f"version of {name}": version(name) for name in packages},
        "environment": {name: os.environ.get(name) for name in COMMON_VARIABLES},
    }


def disagreement(hosts: Sequence[str], differing: Sequence[Mapping[str, Any]]) -> str:
    """What the ranks do not agree on, ranks with the same values together. Pure.

    Args:
        hosts: of all ranks, by rank.
        differing: by rank, the facts that differ.
    """
    flat = [dict(flatten(each)) for each in differing]
    every = dict.fromkeys(path for each in flat for path in each)
    paths = [path for path in every if len({digest(each.get(path, _ABSENT)) for each in flat}) > 1]
    groups: dict[str, list[int]] = {}
    for rank, values in enumerate(flat):
        text = ", ".join(f"{path} = {str(values.get(path, _ABSENT))[:_SHOWN_VALUE]}" for path in paths[:_SHOWN_ROWS])
        groups.setdefault(text, []).append(rank)
    lines = ["the ranks would train different runs; nothing was started."]
    for text, ranks in list(groups.items())[:_SHOWN_ROWS]:
        there = list(dict.fromkeys(hosts[rank] for rank in ranks))
        more = f" and {len(there) - _SHOWN_ROWS} more hosts" if len(there) > _SHOWN_ROWS else ""
        lines.append(f"  rank {as_ranges(ranks)} on {', '.join(there[:_SHOWN_ROWS])}{more}: {text}")
    for what, count in (("groups of ranks", len(groups)), ("differences", len(paths))):
        if count > _SHOWN_ROWS:
            lines.append(f"  and {count - _SHOWN_ROWS} more {what}")
    lines.append("Give every host the same files, versions and variables.")
    return "\n".join(lines)


def digest(fields: Any) -> str:
    """A short fingerprint of JSON-like fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]
