#!/usr/bin/env bash
# The long storm: 200 random kills of ds_trainer and 25 of plain DeepSpeed; about an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python scripts/bench/kill_storm.py --kills 200 --control 25 "$@"
