#!/usr/bin/env bash
# Train on several machines under SLURM:
#
#   sbatch --nodes 4 --gpus-per-node 8 scripts/slurm.sh \
#     --module deepseek_v3 --config deepseek_v3_debugmodel --run-name first \
#     --parallelism.expert-parallel-degree 8
#
# One torchrun per machine; the first machine hosts the rendezvous. Give the run a name: when a worker or a machine
# fails, all workers are started again and go on from its last checkpoint, and so does a job that SLURM requeues.
# The repository, its .venv and the run directory must be on a file system that all machines see.
#SBATCH --job-name=trimtab
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM two minutes before the end: ranks finish their step and save.
#SBATCH --signal=B:TERM@120
set -euo pipefail

root=${TRIMTAB_ROOT:-${SLURM_SUBMIT_DIR:?start it with sbatch}}
nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Without it, workers that restart meet in a store that still holds the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export LOG_RANK=${LOG_RANK:-0}
export root nproc master port=${MASTER_PORT:-29500}

# Each machine says itself whether it hosts the rendezvous: left to guess from its names, none may.
srun --kill-on-bad-exit=1 bash -c '
  host=$([[ $SLURM_NODEID == 0 ]] && echo 1 || echo 0)
  exec "$root/.venv/bin/torchrun" \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-10}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$master:$port" \
    --rdzv-conf "is_host=$host,join_timeout=600" \
    -m trimtab.train.cli train --dump-folder "$root/runs" "$@"' trimtab "$@" &
job=$!
trap 'kill -TERM $job; wait $job' TERM
wait $job
