"""What the benchmarks of files share: their flags, and weights that a disk cannot compress."""

import argparse
from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor


def arguments(description: str | None, child: int) -> argparse.Namespace:
    """The command line; `--child` with so many words is how the benchmark starts itself."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", help="where to work; a temporary directory by default")
    parser.add_argument("--child", nargs=child, help=argparse.SUPPRESS)
    return parser.parse_args()


@cache
def _noise() -> Tensor:
    return torch.randint(-(2**15), 2**15, (2**24,), dtype=torch.int16)


def weight(shape: Sequence[int]) -> Tensor:
    """Random bits in bfloat16; the same 32 MB over and over."""
    count = prod(shape)
    return _noise().repeat(-(-count // len(_noise())))[:count].view(*shape).view(torch.bfloat16)
