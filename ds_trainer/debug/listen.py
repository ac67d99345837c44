"""Wait for an IDE, on this machine only."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

from ds_trainer.errors import RefusedError

LOOPBACK = "127.0.0.1"
"""Whoever reaches a debugger's port can run anything here, so no other address is ever listened on."""


def wait_for_ide(port: int, report: Callable[[str], None]) -> None:
    """Open a port for an IDE and stand still until one has attached.

    Raises:
        RefusedError: debugpy is not installed, or the port is taken.
    """
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # four lines about the interpreter's own frozen modules
    try:
        debugpy = importlib.import_module("debugpy")
    except ModuleNotFoundError:
        raise RefusedError(
            "--listen needs debugpy, which is not installed. Run: pip install 'ds-trainer[debug]' (or pip install debugpy)."
        ) from None
    try:
        debugpy.listen((LOOPBACK, port))
    except (OSError, RuntimeError) as error:  # the port is opened by a process of debugpy's, which tells in words
        raise RefusedError(f"--listen {port}: {error}. Name a free port, for example --listen {port + 1}.") from None
    report(
        f"waiting for an IDE on {LOOPBACK}:{port}. In VS Code: Run and Debug, a configuration with "
        f'"type": "debugpy", "request": "attach", "connect": {{"host": "{LOOPBACK}", "port": {port}}}. '
        f"From another machine first: ssh -L {port}:{LOOPBACK}:{port} THIS_HOST"
    )
    debugpy.wait_for_client()
    report("an IDE has attached")
