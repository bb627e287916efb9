#!/usr/bin/env bash
# Distil a teacher into a pruned student as one of the papers did. README.md lists the recipes.
#
#   DATA=/data/corpus TEACHER=/models/llama3.1-8b STUDENT=/runs/4b SAVE=/runs/distilled \
#       examples/distill/run.sh llama3.1-minitron-4b
#
# What follows the recipe's name goes to distill_gpt.py: --dry-run, or another value in the place of the recipe's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

recipe=${1:-}
file=examples/distill/recipes/$recipe.flags
if [ ! -f "$file" ]; then
    echo "error: no recipe '$recipe'" >&2
    echo "  legal: $(cd examples/distill/recipes && ls | sed 's/\.flags$//' | paste -sd ' ')" >&2
    exit 2
fi
shift
read -ra how <<<"$(grep -v '^#' "$file" | paste -sd ' ')"

TEACHER=${TEACHER:?the checkpoint of the teacher}
STUDENT=${STUDENT:?the checkpoint that prune_gpt.py made of it}
SAVE=${SAVE:?a directory, new or of this job}
DATA=${DATA:?a directory made by megatron-ext data --out}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}
PIPELINE_PARALLEL=${PIPELINE_PARALLEL:-1}
MICRO_BATCH=${MICRO_BATCH:-1}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

flags=(
    --distill-teacher "$TEACHER" --pretrained-checkpoint "$STUDENT" --load "$SAVE" --save "$SAVE" "${how[@]}"
    --data-path "$DATA/text_document" --split 99,1,0
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:-$DATA/tokenizer}"
    --micro-batch-size "$MICRO_BATCH" --use-distributed-optimizer
    --tensor-model-parallel-size "$TENSOR_PARALLEL" --pipeline-model-parallel-size "$PIPELINE_PARALLEL"
)
if [ "$TENSOR_PARALLEL" -gt 1 ]; then flags+=(--sequence-parallel); fi
if [ "${BF16:-1}" = 1 ]; then flags+=(--bf16); fi

# Compiled kernels lie on the node itself: a home directory is often a network disk that every node writes to.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-cache-$(id -u)}
if [ -n "${RANK:-}" ]; then # something else, such as srun, has started one process per GPU
    exec "$PYTHON" distill_gpt.py "${flags[@]}" "$@"
fi
exec "$PYTHON" -m megatron_ext torchrun --standalone --nproc-per-node "$GPUS_PER_NODE" distill_gpt.py "${flags[@]}" "$@"
