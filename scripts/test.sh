#!/usr/bin/env bash
# Install the test extra into .venv and run the tests: ruff, mypy, pytest. Arguments go to pytest: scripts/test.sh tests/unit
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
ensure_environment test

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
