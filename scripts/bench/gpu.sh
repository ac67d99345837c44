#!/usr/bin/env bash
# Measure on whatever GPU there is: one step of gpu.py, each in under ten minutes, or all of them one after the other.
#   scripts/bench/gpu.sh ceilings|full_ft|lora_8b|full_8b|pack_vs_pad|loss_head|attention|host_sync|zero3_host|offload_3b|max_seq|compile|all
# `--dry` tries a step with tiny shapes on a CPU. It uses the `python` that is found: this project must be importable by it.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
step=${1:---help}
shift || true
[ "$step" = all ] || exec python scripts/bench/gpu.py "$step" "$@"
failed=0
for each in ceilings full_ft lora_8b full_8b pack_vs_pad loss_head attention host_sync zero3_host offload_3b max_seq compile; do
    echo "== $each"
    python scripts/bench/gpu.py "$each" "$@" || failed=1
done
exit $failed
