"""Runs on each host: what it has of the ops a run needs, or their build. Answers like the probe that started it."""

from __future__ import annotations

import json
import os
import sys

from ds_trainer.doctor.probe import say


def main(command: str, device: str, names: list[str]) -> None:
    """Examine or build ops.

    Args:
        command: `examine` or `build`.
        device: `cuda` or `cpu`.
        names: of the ops.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ds_trainer.engine.offload import build_op, examine_op
    from ds_trainer.errors import BuildError

    found = []
    for name in names:
        answer = {}
        if command == "build":
            try:
                build_op(name, lambda line: say({"say": line}))
            except BuildError as error:
                answer = {"failed": str(error)}
        found.append({**examine_op(name), **answer})
    say({"ops": found})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
