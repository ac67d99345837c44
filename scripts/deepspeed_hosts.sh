#!/usr/bin/env bash
# Train on the machines of a hostfile with `deepspeed`, typed on one of them, after a look at all of them.
#   scripts/deepspeed_hosts.sh hostfiles/two_nodes.hostfile run.yaml [section.key=value ...]
set -euo pipefail
hostfile=${1:?which hostfile?} config=${2:?which run file?}
shift 2
ds_trainer doctor --hostfile "$hostfile" --config "$config" "$@"
# A variable first: where the command is refused, nothing is started.
command=$(ds_trainer launch-command --hostfile "$hostfile" --config "$config" "$@")
eval "exec $command"
