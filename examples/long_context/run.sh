#!/usr/bin/env bash
# Go on training a model at a longer sequence. README.md lists the recipes.
#
#   DATA=/data/long MODEL=/runs/hybrid-8b SAVE=/runs/hybrid-8b-16k examples/long_context/run.sh 16k
#   DATA=/data/long MODEL=/runs/transformer SAVE=/runs/transformer-16k examples/long_context/run.sh 16k --rotary-base 42000
#
# What follows the recipe's name goes to pretrain_hybrid.py: --dry-run, or another value in the place of the recipe's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

recipe=${1:-}
file=examples/long_context/recipes/$recipe.flags
if [ ! -f "$file" ]; then
    echo "error: no recipe '$recipe'" >&2
    echo "  legal: $(cd examples/long_context/recipes && ls | sed 's/\.flags$//' | paste -sd ' ')" >&2
    exit 2
fi
shift
read -ra how <<<"$(grep -v '^#' "$file" | paste -sd ' ')"

MODEL=${MODEL:?the trained checkpoint}
SAVE=${SAVE:?a directory, new or of this job}
DATA=${DATA:?a directory made by megatron-ext data --out}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-4}
PIPELINE_PARALLEL=${PIPELINE_PARALLEL:-1}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

flags=(
    --pretrained-checkpoint "$MODEL" --load "$SAVE" --save "$SAVE" "${how[@]}"
    --data-path "$DATA/text_document" --split 99,1,0
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:-$DATA/tokenizer}"
    --micro-batch-size 1 --use-distributed-optimizer --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --tensor-model-parallel-size "$TENSOR_PARALLEL" --pipeline-model-parallel-size "$PIPELINE_PARALLEL"
)
if [ "$TENSOR_PARALLEL" -gt 1 ]; then flags+=(--sequence-parallel); fi
if [ "${BF16:-1}" = 1 ]; then flags+=(--bf16); fi

# Compiled kernels lie on the node itself: a home directory is often a network disk that every node writes to.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-cache-$(id -u)}
if [ -n "${RANK:-}" ]; then # something else, such as srun, has started one process per GPU
    exec "$PYTHON" pretrain_hybrid.py "${flags[@]}" "$@"
fi
exec "$PYTHON" -m megatron_ext torchrun --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NNODES" \
    --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
    pretrain_hybrid.py "${flags[@]}" "$@"
