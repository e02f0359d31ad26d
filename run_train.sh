#!/usr/bin/env bash
# Train a model: ./run_train.sh [--section.option value ...]
#
#   MODULE    family of the model           (default deepseek_v3)
#   CONFIG    config of that family         (default deepseek_v3_debugmodel)
#   NGPU      number of processes           (default 1; this version trains in one)
#   LOG_RANK  ranks that print, as in 0,1   (default 0)
#   PYTHON    Python that makes the virtual environment (default python3)
#
# The first start makes .venv and installs into it; later starts only train.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
module=${MODULE:-deepseek_v3}
config=${CONFIG:-deepseek_v3_debugmodel}
ngpu=${NGPU:-1}

if [[ ! $ngpu =~ ^[1-9][0-9]*$ ]]; then
  echo "run_train.sh: NGPU='$ngpu' must be a positive number of processes; set NGPU=1" >&2
  exit 2
fi
if ((ngpu > 1)); then
  echo "run_train.sh: NGPU=$ngpu, but this version trains in one process; set NGPU=1, or attach trimtab's" \
    "balancer in a distributed trainer (trimtab.attach)" >&2
  exit 2
fi

source "$root/scripts/environment.sh"
prepare_environment "$root" train

# On cores that other programs use too, OpenMP threads that spin while they wait slow a step down many times.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export LOG_RANK=${LOG_RANK:-0}
exec "$root/.venv/bin/python" -m trimtab.train.cli train --module "$module" --config "$config" \
  --dump-folder "$root/runs" "$@"
