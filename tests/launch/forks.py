"""Many commands for the price of one start: see workers/forks.py."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from helpers import clean_environment, run_command


@dataclass
class Command:
    arguments: list[str]
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Shown:
    """What a command showed on the terminal, all ranks together, and how its ranks ended."""

    text: str
    codes: list[int]
    seconds: float


def run_all(commands: dict[str, Command], folder: Path, timeout: float = 150) -> dict[str, Shown]:
    asked, results = folder / "commands.json", folder / "results.json"
    asked.write_text(json.dumps({name: vars(each) for name, each in commands.items()}))
    worker = Path(__file__).parent / "workers" / "forks.py"
    done = run_command(
        [sys.executable, str(worker), str(asked), str(results)], cwd=folder, timeout=timeout, env=clean_environment()
    )
    assert done.code == 0, done.text
    return {name: Shown(**each) for name, each in json.loads(results.read_text()).items()}
