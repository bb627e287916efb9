"""The flags that are read before all others, and those that go in front of the user's: defaults for this machine."""

import argparse
import importlib.util
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from megatron_ext import platform
from megatron_ext.options import readable
from megatron_ext.options.fields import add_options

VOCAB_MULTIPLE = 128


# Flags of Megatron's and of every job that must be known before Megatron's own parser can be made: what is loaded, the
# layout that it is loaded on, and by which kernels.
_EARLY: dict[str, dict[str, Any]] = {
    "--preset": {}, "--dry-run": {"action": "store_true"}, "--ext-ssm-backend": {"default": "auto"},
    "--load": {"type": Path}, "--save": {"type": Path}, "--pretrained-checkpoint": {"type": Path},
    "--ckpt-step": {"type": int}, "--tokenizer-model": {}, "--tokenizer-type": {}, "--rerun-mode": {},
    "--tensor-model-parallel-size": {"type": int, "default": 1}, "--context-parallel-size": {"type": int, "default": 1},
    "--pipeline-model-parallel-size": {"type": int, "default": 1},
    "--expert-model-parallel-size": {"type": int, "default": 1}, "--expert-tensor-parallel-size": {"type": int},
    "--make-vocab-size-divisible-by": {"type": int}, "--seq-length": {"type": int},
    "--micro-batch-size": {"type": int, "default": 1}, "--bf16": {"action": "store_true"},
    "--fp16": {"action": "store_true"},
}  # fmt: skip


class EarlyArgument(Protocol):
    """A flag of Megatron's that a parser can learn."""

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Let a parser know it; None where it is not given."""
        ...


def early_parser(
    options: Mapping[str, type] = MappingProxyType({}), arguments: Iterable[EarlyArgument] = ()
) -> argparse.ArgumentParser:
    """A parser of the flags that must be known before Megatron's own parser can be made.

    Args:
        options: Dataclasses of flags by their prefix, which are read, too.
        arguments: Further flags of Megatron's, such as those of the model.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, details in _EARLY.items():
        parser.add_argument(flag, **details)
    for prefix, dataclass in options.items():
        add_options(parser, dataclass, prefix)
    for argument in arguments:
        argument.add_to(parser)
    readable.patch_parser(parser)
    return parser


def read_early(
    words: Sequence[str],
    options: Mapping[str, type] = MappingProxyType({}),
    arguments: Iterable[EarlyArgument] = (),
) -> Namespace:
    """What `early_parser` reads of a command line, and leaves to Megatron's parser like all the rest.

    Raises:
        ConfigError: One of its flags has an illegal value.
    """
    return early_parser(options, arguments).parse_known_args(equals_form(words))[0]


def given_flags(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every flag on a command line, and the value that is in its word or may be the next one."""
    for word, after in pairwise([*words, ""]):
        flag, _, value = word.partition("=")
        if flag.startswith("--"):
            yield flag, value or after


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
        flags += ["--no-bias-gelu-fusion", "--no-bias-dropout-fusion"]  # torch.compile
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
