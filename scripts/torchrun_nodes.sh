#!/usr/bin/env bash
# Train on several machines with torchrun: the same line on each of them, in any order.
#   scripts/torchrun_nodes.sh FIRST_HOST NODES run.yaml [section.key=value ...]
#
# They meet at FIRST_HOST, port 29500, which is one of them. After a rank or a machine is lost, all ranks are started again, up to
# three times, and go on from the last checkpoint; NODES=1:4 goes on with what is left of four.
set -euo pipefail
first=${1:?which host do they meet at?} nodes=${2:?how many machines?} config=${3:?which run file?}
shift 3
exec torchrun --nnodes "$nodes" --nproc-per-node "${RANKS_PER_NODE:-gpu}" --max-restarts 3 --shutdown-timeout 300 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" -m ds_trainer train --config "$config" "$@"
