"""Megatron's flags that would be accepted here and do nothing, or end in a traceback: refused by name, in milliseconds.

Flags that change what a model computes are `models.megatron_args`' matter. Which of all flags change the result of two
steps was found by training with and without each (`tests/functional/test_flags.py` does so for those of the data, the
loss and the optimizer); what is refused is in these tables. `*` stands for any ending.
"""

import fnmatch
import functools
import importlib.util
import re
from collections.abc import Sequence

from megatron_ext import platform
from megatron_ext.errors import ConfigError
from megatron_ext.options.early_flags import given_flags

DOCUMENTS = "attention and Mamba-2 states run over whole rows, across the documents in them"
VALIDATION = "--eval-iters N; pretrain_hybrid.py --skip-train measures on the whole validation split"
PLAIN = "none: the data of `megatron-ext data`"
BORDERS = "| in --hybrid-layer-pattern"

REFUSED: dict[tuple[str, str], str] = {
    (DOCUMENTS, "none; --eod-mask-loss leaves the tokens between documents out of the loss"): """
        reset-attention-mask reset-position-ids dataloader-inter-document-masking hybrid-context-parallel
        max-seqlen-per-dp-cp-rank
    """,
    ("there is no supervised fine-tuning on conversations", PLAIN): "sft sft-tokenizer-prompt-format chat-template",
    ("there is no fill-in-the-middle", PLAIN): "fim-*",
    ("validation is on one set, for a number of batches", VALIDATION): """
        full-validation multiple-validation-sets validation-set-names
    """,
    ("the index caches are built by the job itself", "--data-cache-path DIR"): """
        per-dataset-sequences-path dataloader-fast-cache-load dataloader-defer-npy-index-mmap
    """,
    ("a run has one phase", "--lr-decay-style WSD, or a second run"): "phase-transition-iterations",
    ("the layer pattern says where the pipeline is cut", BORDERS): """
        decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers pipeline-model-parallel-layout
    """,
    ("the layer pattern says how many layers there are", "--hybrid-layer-pattern"): """
        encoder-num-layers decoder-num-layers
    """,
    ("positions are chosen otherwise", "--position-embedding-type none"): "no-position-embedding",
    ("models are trained, not steered", "pretrain_hybrid.py, distill_gpt.py"): """
        perform-rl-step rl-* grpo-* langrl-* refit-method
    """,
    ("teachers are cached by distill_gpt.py", "--distill-cache-write DIR"): "logits-save-* logits-load-*",
    ("Megatron's inference engines are not used", "megatron-ext generate, megatron-ext evaluate"): """
        inference-batch-* inference-cuda-* inference-coord* inference-disable-* inference-dynamic-* inference-fuse-*
        inference-grouped-* inference-logging-* inference-max-* inference-moe-* inference-shards inference-text-*
        inference-use-* inference-wandb-* flash-decode nccl-all-reduce-for-prefill mlp-chunks-for-prefill
        batch-invariant-mode use-legacy-static-engine decode-only-cuda-graphs enable-chunked-prefill
        num-speculative-tokens use-same-sampling-seed-across-dp-ranks mamba-inference-* max-tokens-to-oom
        cache-mla-latents moe-pad-experts-for-cuda-graph-inference
    """,
    ("its checkpoints are in formats that no job here reads", "--use-distributed-optimizer"): """
        use-megatron-fsdp use-torch-fsdp2 fsdp-* megatron-fsdp-* data-parallel-sharding-strategy
        outer-dp-sharding-strategy enable-full-sharding-in-hsdp keep-fp8-transpose-cache create-all-gather-group
        suggested-communication-unit-size torch-fsdp2-no-reshard-after-forward init-model-with-meta-device
    """,
    ("this is about images, retrieval or encoders", "none"): """
        ict-* biencoder-* bert-* output-bert-embeddings titles-data-path query-in-block-prob use-one-sent-docs
        evidence-data-path retriever-* block-data-path embedding-path indexer-* num-classes img-h img-w num-channels
        patch-dim classes-fraction data-per-class-fraction no-data-sharding head-lr-mult vision-* swin-backbone-type
        mask-type mask-factor mask-prob short-seq-prob sample-rate iter-per-epoch dino-* encoder-seq-length
        decoder-seq-length
    """,
    ("Megatron-Core 0.19.2 reads it nowhere", "--step-batch-size-schedule"): "rampup-batch-size",
    ("nothing in this version honours it", "none"): """
        freeze-all-layers init-method-xavier-uniform lazy-mpu-init fake-process-group yaml-cfg onnx-safe
        run-workload-inspector-server moe-use-upcycling moe-upcycling-granularity
    """,
}  # fmt: skip
"""Why and what instead, and the flags."""

TRANSFORMER_ENGINE = """
    fp8-format fp8-param-gather fp8-output-proj fp4-format fp4-param-gather first-last-layers-bf16
    te-precision-config-file use-kitchen-attention use-transformer-engine-op-fuser use-te-activation-func
    tp-comm-overlap delay-wgrad-compute overlap-dispatch-backward-with-experts-wgrad cpu-offloading-num-layers
    fine-grained-activation-offloading optimizer-cpu-offload symmetric-ar-type moe-permute-fusion moe-router-fusion
    moe-grouped-gemm use-grouped-gemm-for-shared-expert use-grouped-gemm-for-dense-mlp fp32-residual-connection
    use-precision-aware-optimizer qk-clip enable-cuda-graph external-cuda-graph optimizer-cuda-graph
"""
"""Kernels that nothing stands in for."""

CUDA = """
    use-nccl-ub use-sharp sharp-enabled-group nccl-communicator-config-path ddp-average-in-collective
    record-memory-history gpu-sniff-test-interval flight-recorder-dump-path async-save use-persistent-ckpt-worker
"""
"""What gloo and the host have no counterpart of; the process that saves meanwhile waits for a device for ever."""

WORKER = "--use-persistent-ckpt-worker"

EMERGING = ("muon", "dist_muon", "adaptive_muon", "lion", "soap")
"""Optimizers of the package `emerging_optimizers`."""


def check_flags(words: Sequence[str]) -> None:
    """Check that every flag of Megatron's that is given can do what it says.

    Args:
        words: The command line.

    Raises:
        ConfigError: Names the flag, why, and what would do.
    """
    found = refusal(words)
    if found is not None:
        flag, why, legal = found
        raise ConfigError(f"{flag} would have no effect: {why}", got=flag, legal=legal)


def refusal(words: Sequence[str]) -> tuple[str, str, str] | None:
    """The first flag that is refused, why, and what is legal; None if there is none."""
    engine = importlib.util.find_spec("transformer_engine") is not None
    for flag, value in given_flags(words):
        name = flag[2:]
        for (why, legal), names in REFUSED.items():
            if _matches(name, names):
                return flag, why, legal
        if not engine and (name in TRANSFORMER_ENGINE.split() or (name == "cuda-graph-impl" and value != "none")):
            return flag, "it needs Transformer Engine, which is not installed", "none, or an installation with it"
        if name in CUDA.split() and platform.device_type() == "cpu":
            return flag, "it needs CUDA devices", "none"
        if name == "async-save" and WORKER not in words:
            return flag, "Megatron switches it off without the process that saves", f"{flag} {WORKER}"
        if name == "num-workers" and value != "0" and platform.device_type() == "cpu":
            return f"{flag} {value}", "the workers' memory is pinned for a CUDA device", "0"
        if name == "optimizer" and value in EMERGING and importlib.util.find_spec("emerging_optimizers") is None:
            return f"{flag} {value}", "the package emerging_optimizers is not installed", "adam or sgd"
        if name == "enable-msc" and importlib.util.find_spec("multistorageclient") is None:
            return flag, "the package multi-storage-client is not installed", "files"
        if name == "rerun-mode" and value == "report_stats":
            return f"{flag} {value}", "Megatron-Core 0.19.2 fails on its own name", "disabled or validate_results"
        if name == "dataloader-type" and value == "external":
            return f"{flag} {value}", "the data are Megatron's datasets", "single or cyclic"
    return None


def _matches(name: str, names: str) -> bool:
    return _pattern(names).match(name) is not None


@functools.cache
def _pattern(names: str) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, names.split())))
