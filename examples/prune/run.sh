#!/usr/bin/env bash
# Cut a model as one of the papers did. README.md lists the recipes.
#
#   DATA=/data/corpus LOAD=/models/llama3.1-8b SAVE=/runs/4b examples/prune/run.sh llama3.1-minitron-4b-width
#
# What follows the recipe's name goes to prune_gpt.py: --dry-run, or another target in the place of the recipe's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

recipe=${1:-}
file=examples/prune/recipes/$recipe.flags
if [ ! -f "$file" ]; then
    echo "error: no recipe '$recipe'" >&2
    echo "  legal: $(cd examples/prune/recipes && ls | sed 's/\.flags$//' | paste -sd ' ')" >&2
    exit 2
fi
shift
read -ra cut <<<"$(grep -v '^#' "$file" | paste -sd ' ')"

LOAD=${LOAD:?the checkpoint to cut}
SAVE=${SAVE:?a new directory}
DATA=${DATA:?a directory made by megatron-ext data --out}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}
PIPELINE_PARALLEL=${PIPELINE_PARALLEL:-1}
SEQ_LENGTH=${SEQ_LENGTH:-8192}
MICRO_BATCH=${MICRO_BATCH:-1}
GLOBAL_BATCH=${GLOBAL_BATCH:-64}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

flags=(
    --load "$LOAD" --save "$SAVE" "${cut[@]}"
    --data-path "$DATA/text_document" --split 99,1,0
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:-$DATA/tokenizer}"
    --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
    --tensor-model-parallel-size "$TENSOR_PARALLEL" --pipeline-model-parallel-size "$PIPELINE_PARALLEL"
)
if [ "$TENSOR_PARALLEL" -gt 1 ]; then flags+=(--sequence-parallel); fi
if [ "${BF16:-1}" = 1 ]; then flags+=(--bf16); fi

# Compiled kernels lie on the node itself: a home directory is often a network disk that every node writes to.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-cache-$(id -u)}
if [ -n "${RANK:-}" ]; then # something else, such as srun, has started one process per GPU
    exec "$PYTHON" prune_gpt.py "${flags[@]}" "$@"
fi
exec "$PYTHON" -m megatron_ext torchrun --standalone --nproc-per-node "$GPUS_PER_NODE" prune_gpt.py "${flags[@]}" "$@"
