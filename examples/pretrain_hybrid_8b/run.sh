#!/usr/bin/env bash
# Pre-train the 8B Mamba-2-Hybrid of arXiv 2406.07887 on this node, or as one of several nodes. README.md explains.
#
#   DATA=/data/corpus SAVE=/runs/hybrid-8b examples/pretrain_hybrid_8b/run.sh
#   DRY_RUN=1 examples/pretrain_hybrid_8b/run.sh        # validate, print model, memory and layout; no GPU needed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SAVE=${SAVE:-runs/pretrain_hybrid_8b}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}
TRAIN_ITERS=${TRAIN_ITERS:-262144} # x 1024 x 4096 = 1.1T tokens
MICRO_BATCH=${MICRO_BATCH:-4}
GLOBAL_BATCH=${GLOBAL_BATCH:-1024}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-4}
PIPELINE_PARALLEL=${PIPELINE_PARALLEL:-1}
DRY_RUN=${DRY_RUN:-0}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

# DATA is what `megatron-ext data --out` made. A blend: DATA_PATH="0.7 /data/a/text_document 0.3 /data/b/text_document".
if [ -n "${DATA:-}${DATA_PATH:-}" ]; then
    read -ra prefixes <<<"${DATA_PATH:-$DATA/text_document}"
    TOKENIZER=${TOKENIZER:-${DATA:?DATA or TOKENIZER must name the tokenizer}/tokenizer}
    data=(--data-path "${prefixes[@]}" --split 99,1,0
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER")
elif [ "$DRY_RUN" = 1 ]; then
    data=(--mock-data --tokenizer-type NullTokenizer --vocab-size 256000)
else
    echo 'error: DATA is not set' >&2
    echo '  legal: DATA=DIR, a directory made by `megatron-ext data --out DIR`' >&2
    exit 2
fi

flags=(
    --preset mamba2-hybrid-8b
    "${data[@]}"
    # The published recipe.
    --seq-length 4096 --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
    --train-iters "$TRAIN_ITERS" --lr 2.5e-4 --min-lr 2.5e-5 --lr-decay-style cosine --lr-warmup-iters 50
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --init-method-std 0.02
    # How it is spread over the GPUs; the result does not depend on it.
    --tensor-model-parallel-size "$TENSOR_PARALLEL" --pipeline-model-parallel-size "$PIPELINE_PARALLEL"
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --cross-entropy-loss-fusion
    # The same directory twice: started again with the same command, the run goes on from its last step.
    --save "$SAVE" --load "$SAVE" --save-interval 1000 --exit-signal-handler
    --dist-ckpt-optim-fully-reshardable
    --eval-interval 1000 --eval-iters 32 --log-interval 10 --tensorboard-dir "$SAVE/tensorboard"
)
if [ "$TENSOR_PARALLEL" -gt 1 ]; then flags+=(--sequence-parallel); fi

if [ "$DRY_RUN" = 1 ]; then
    export WORLD_SIZE=$((GPUS_PER_NODE * NNODES))
    exec "$PYTHON" pretrain_hybrid.py "${flags[@]}" --dry-run "$@"
fi

# Compiled kernels lie on the node itself: a home directory is often a network disk that every node writes to.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-cache-$(id -u)}
if [ -n "${RANK:-}" ]; then # something else, such as srun, has started one process per GPU
    export MASTER_ADDR MASTER_PORT
    exec "$PYTHON" pretrain_hybrid.py "${flags[@]}" "$@"
fi
exec "$PYTHON" -m megatron_ext torchrun --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" pretrain_hybrid.py "${flags[@]}" "$@"
