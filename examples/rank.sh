#!/usr/bin/env bash
# One rank of a command under srun, one task per GPU:  srun examples/rank.sh pretrain --preset mamba2-hybrid-8b ...
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}" -m megatron_ext "$@"
