#!/usr/bin/env bash
# Install the test extra into .venv and run the tests: ruff, mypy, pytest. Arguments go to pytest: scripts/test.sh tests/unit
#
# Without arguments, tests that start processes and wait for them get a second chance, alone: what failed because the machine was
# busy passes then, what is broken fails again. The first failure is printed in full all the same, and is a defect to mend.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
ensure_environment test

ruff check .
ruff format --check .
mypy
if [ $# -gt 0 ]; then
    python -m pytest "$@"
    exit
fi
python -m pytest tests/unit tests/configs
processes=(tests/ranks tests/launch tests/cluster tests/faults tests/gpu)
python -m pytest "${processes[@]}" || {
    printf '\n>>> the tests that failed, once more\n'
    python -m pytest --last-failed "${processes[@]}"
    printf '>>> they passed alone: see above what they said before\n'
}
