"""What numbers flags take: a size of 0, a rate of infinity and the like are refused where they are read.

Megatron's flags are whole numbers or floats to argparse, and what is out of range ends far from there: in a division by
zero, in a process group, in a training whose loss is NaN. A table of name patterns says what is legal instead, for
Megatron's flags and ours.
"""

import argparse
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

POSITIVE = """
    *-size *-sizes *-length *-lengths *-interval num-layers num-layers-* num-attention-heads num-query-groups
    kv-channels mamba-* num-experts moe-router-topk max-position-embeddings rotary-base rotary-percent train-samples
    make-vocab-size-divisible-by distributed-timeout-minutes adam-eps norm-epsilon init-method-std
    max-bytes max-new-tokens batch-tokens window stride gpus shard-gb pad-vocab-to speed
"""
"""Flags that must be positive, but for those whose own default is 0."""

MAY_BE_ZERO = "save-interval"
SIGNED = "glu-linear-offset null-tokenizer-* rl-* local-rank"
"""Flags that may be negative; so may those whose default is."""

BELOW = {
    "adam-beta1": 1.0, "adam-beta2": 1.0, "sgd-momentum": 1.0, "hidden-dropout": 1.0, "attention-dropout": 1.0,
    # Megatron lists the samples before it reads one; a calibration takes about a thousand.
    "prune-samples": 1e7, "prune-depth-samples": 1e7,
}  # fmt: skip
"""What a flag's number must be less than."""


@dataclass(frozen=True)
class Number:
    """A whole number or a float in a range, as an argparse type.

    Attributes:
        kind: int or float.
        signed: Whether it may be negative.
        positive: Whether 0 is refused.
        below: What a legal number is less than.
    """

    kind: type[int] | type[float]
    signed: bool = False
    positive: bool = False
    below: float = math.inf

    def __call__(self, text: str) -> int | float:
        """The number that `text` says.

        Raises:
            argparse.ArgumentTypeError: It says none, or one that is not legal.
        """
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        legal = value > 0 if self.positive else self.signed or value >= 0
        if not math.isfinite(value) or not legal or value >= self.below:
            raise argparse.ArgumentTypeError(f"{self}, not {text!r}")
        return value

    @property
    def __name__(self) -> str:
        """How argparse and lists of flags call the type."""
        return self.kind.__name__

    def __str__(self) -> str:
        """What is legal."""
        words = "a whole number" if self.kind is int else "a finite number"
        if self.positive:
            words += " of at least 1" if self.kind is int else " above 0"
        elif not self.signed:
            words += " of at least 0"
        return words + (f" and below {self.below:,.9g}" if math.isfinite(self.below) else "")


def restrict(parser: argparse.ArgumentParser) -> None:
    """Let every flag of `parser` that is a number take legal ones only."""
    for action in parser._actions:
        if action.option_strings and action.type in (int, float):
            action.type = _number(action)


def _number(action: argparse.Action) -> Number:
    kind: Any = action.type
    name = action.option_strings[0].removeprefix("--")
    default = action.default if isinstance(action.default, int | float) else 1
    signed = _among(name, SIGNED) or default < 0
    positive = _among(name, POSITIVE) and not _among(name, MAY_BE_ZERO) and default > 0
    return Number(kind, signed, positive, BELOW.get(name, math.inf))


def _among(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())
