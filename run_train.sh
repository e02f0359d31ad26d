#!/usr/bin/env bash
# Train a model: ./run_train.sh [--section.option value ...]
#
#   MODULE    family of the model           (default deepseek_v3)
#   CONFIG    config of that family         (default deepseek_v3_debugmodel)
#   NGPU      processes on this machine, on CPUs too (default 1)
#   LOG_RANK  ranks that print, as in 0,1   (default 0)
#   PYTHON    Python that makes the virtual environment (default python3)
#
# On several machines, start the same command on each, with
#
#   NNODES       number of machines         (default 1)
#   NODE_RANK    number of this one, from 0 (default 0)
#   MASTER_ADDR  name or address of machine 0
#   MASTER_PORT  free port of machine 0     (default 29500)
#
# Ranks of a machine follow each other; which machine has rank 0 is decided as they meet. Run directories must be
# on a file system that all of them see.
#
# The first start makes .venv and installs into it; later starts only train.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
module=${MODULE:-deepseek_v3}
config=${CONFIG:-deepseek_v3_debugmodel}
ngpu=${NGPU:-1}
nnodes=${NNODES:-1}

for name in ngpu nnodes; do
  if [[ ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
    variable=$(tr '[:lower:]' '[:upper:]' <<<"$name")
    echo "run_train.sh: $variable='${!name}' must be a positive number; set $variable=1" >&2
    exit 2
  fi
done
if ((nnodes > 1)); then
  set -- --nnodes "$nnodes" --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-}" \
    --master-port "${MASTER_PORT:-29500}" "$@"
fi

source "$root/scripts/environment.sh"
prepare_environment "$root" train

# On cores that other programs use too, OpenMP threads that spin while they wait slow a step down many times.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export LOG_RANK=${LOG_RANK:-0}
exec "$root/.venv/bin/python" -m trimtab.train.cli train --module "$module" --config "$config" \
  --nproc "$ngpu" --dump-folder "$root/runs" "$@"
