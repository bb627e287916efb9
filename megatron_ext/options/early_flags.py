"""The flags that go in front of the user's: those of the model, which is read early, and defaults for this machine."""

import argparse
import importlib.util
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_ext import platform
from megatron_ext.options.readable import mend

VOCAB_MULTIPLE = 128


def early_parser() -> argparse.ArgumentParser:
    """What must be known before Megatron's own parser can be made."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--hybrid-layer-pattern")
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--pretrained-checkpoint", type=Path)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument("--expert-tensor-parallel-size", type=int)
    parser.add_argument("--make-vocab-size-divisible-by", type=int)
    parser.add_argument("--padded-vocab-size", type=int)
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--tokenizer-type")
    parser.add_argument("--ext-ssm-backend", default="auto")
    parser.add_argument("--seq-length", type=int)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--max-position-embeddings", type=int)
    parser.add_argument("--rotary-base", type=int)
    parser.add_argument("--use-rope-scaling", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--mamba-num-heads", type=int)
    parser.add_argument("--mamba-head-dim", type=int, default=64)
    parser.add_argument("--mamba-state-dim", type=int, default=128)
    parser.add_argument("--mamba-num-groups", type=int, default=8)
    mend(parser)
    return parser


def equals_form(argv: Sequence[str]) -> list[str]:
    """A pattern may begin with "-", which argparse would take for a flag: `--hybrid-layer-pattern=-M...`."""
    argv, joined = list(argv), []
    while argv:
        word = argv.pop(0)
        if word == "--hybrid-layer-pattern" and argv:
            word += "=" + argv.pop(0)
        joined.append(word)
    return joined


def default_flags() -> list[str]:
    """Flags that every job sets unless the user does."""
    # None of the models this product is about uses dropout; Megatron's default is 0.1.
    flags = ["--ckpt-format", "torch_dist", "--hidden-dropout", "0", "--attention-dropout", "0"]
    # Megatron has no defaults for these, and fails late and obscurely without them.
    flags += ["--micro-batch-size", "1", "--eval-interval", "1000", "--save-interval", "1000"]
    # Every token of a batch counts alike, whichever micro-batch and rank it is on and however many are masked there.
    flags += ["--calculate-per-token-loss"]
    # Attention is causal by itself; a mask is a square of the sequence, 17 GB at 131,072 tokens.
    flags += ["--no-create-attention-mask-in-dataloader"]
    on_cpu = platform.device_type() == "cpu"
    if on_cpu:
        flags += ["--distributed-backend", "gloo", "--num-workers", "0"]
        flags += ["--no-bias-swiglu-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion"]  # torch.compile
    if on_cpu or importlib.util.find_spec("transformer_engine") is None:
        # CUDA kernels of Transformer Engine and Apex.
        flags += ["--no-gradient-accumulation-fusion", "--no-rope-fusion"]
        flags += ["--no-masked-softmax-fusion", "--no-persist-layer-norm"]
    return flags


def vocab_flags(early: Namespace) -> list[str]:
    """What the vocabulary is padded to."""
    # Megatron pads to a multiple of (divisor x TP). The model must not depend on TP, so the product is fixed.
    if early.make_vocab_size_divisible_by is not None:
        return []
    tp = early.tensor_model_parallel_size
    multiple = VOCAB_MULTIPLE if VOCAB_MULTIPLE % tp == 0 else VOCAB_MULTIPLE * tp
    return ["--make-vocab-size-divisible-by", str(multiple // tp)]
