#!/usr/bin/env bash
# Check everything: ./run_tests.sh [pytest arguments]
#
# Installs what tests need into .venv, then runs the linter, the formatter, the type checker and the tests.
# With arguments, only pytest runs, on them: ./run_tests.sh tests/train -k resume
#
#   WORKERS   test processes (default: number of cores, at most 8)
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$root/scripts/environment.sh"
prepare_environment "$root" train,test,dev
cd -- "$root"
python() { "$root/.venv/bin/python" "$@"; }

cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
workers=${WORKERS:-$((cores < 8 ? cores : 8))}
# Each worker is one thread: threads of several workers on the same cores wait for each other.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=passive

if (($# == 0)); then
  python -m ruff check .
  python -m ruff format --check .
  python -m mypy
fi
python -m pytest -n "$workers" --dist worksteal "$@"
