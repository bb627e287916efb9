#!/usr/bin/env bash
# Run a recipe on this node, or as one of several nodes. README.md lists the recipes and the variables.
#
#   DATA=/data/corpus LOAD=/models/llama3.1-8b SAVE=/runs/4b examples/run.sh prune/llama3.1-minitron-4b-width
#   examples/run.sh pretrain/mamba2-hybrid-8b --dry-run      # model, memory and layout; no GPU needed
#
# What follows the recipe's name goes to the program: another value in the place of the recipe's, say.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipe=${1:-}
folder=examples/${recipe%%/*}
file=$folder/recipes/${recipe#*/}.flags
if [ ! -f "$file" ]; then
    echo "error: no recipe '$recipe'" >&2
    echo "  legal: $(printf '%s\n' examples/*/recipes/*.flags | sed 's|examples/||; s|recipes/||; s|\.flags$||' | paste -sd ' ')" >&2
    exit 2
fi
shift

# The program and its flags, as bash reads words: those of all recipes of the folder, then the recipe's.
eval "words=($(cat "$folder/all.flags" "$file"))"

case " $* " in *' --dry-run '*) dry_run=1 ;; *) dry_run= ;; esac
# DATA is what `megatron-ext data --out` made. A blend: DATA_PATH="0.7 /data/a/text_document 0.3 /data/b/text_document".
if [ -n "${DATA:-}${DATA_PATH:-}" ]; then
    if [ -n "${DATA_PATH:-}" ]; then read -ra prefixes <<<"$DATA_PATH"; else prefixes=("$DATA/text_document"); fi
    tokenizer=${TOKENIZER:-${DATA:?DATA or TOKENIZER must name the tokenizer}/tokenizer}
    words+=(--data-path "${prefixes[@]}" --split 99,1,0 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer")
elif [ -n "$dry_run" ]; then
    words+=(--mock-data)
else
    echo 'error: DATA is not set' >&2
    echo '  legal: DATA=DIR, a directory made by `megatron-ext data --out DIR`' >&2
    exit 2
fi

if [ "$TENSOR_PARALLEL" -gt 1 ]; then words+=(--sequence-parallel); fi
if [ "${BF16:-1}" = 1 ]; then words+=(--bf16); fi

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

if [ -n "${SHOW:-}" ]; then # one word a line
    printf '%s\n' "${words[@]}" "$@"
    exit
fi
if [ -n "$dry_run" ]; then
    export WORLD_SIZE=$((GPUS_PER_NODE * NNODES))
    exec "$PYTHON" "${words[@]}" "$@"
fi

# Compiled kernels lie on the node itself: a home directory is often a network disk that every node writes to.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-cache-$(id -u)}
if [ -n "${RANK:-}" ]; then # something else, such as srun, has started one process per GPU
    exec "$PYTHON" "${words[@]}" "$@"
fi
if [ "$NNODES" = 1 ]; then
    nodes=(--standalone)
else
    nodes=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-0}")
    nodes+=(--master-addr "${MASTER_ADDR:?the first node}" --master-port "${MASTER_PORT:-29500}")
fi
exec "$PYTHON" -m megatron_ext torchrun --nproc-per-node "$GPUS_PER_NODE" "${nodes[@]}" "${words[@]}" "$@"
