"""What all kernels share: how they are compiled, their matrix product, and what the interpreter cannot do.

With `TRITON_INTERPRET=1` in the environment before Triton is imported, the kernels run on a CPU, one program after the
other: for correctness, never for speed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
# The interpreter multiplies the bit patterns of bfloat16 as if they were whole numbers.
WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b):
    """a @ b in float32; float32 operands as three products of TF32 parts, which keeps their precision."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), which overflows nowhere."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


def configs(*choices: tuple[int, int]) -> list[triton.Config]:
    """Configurations to time, from (warps, stages); the first one is taken where none may be timed, so it must fit.

    One that asks for more shared memory than there is drops out of the race.

    They change the speed, and the order of the sums within a tile, but not between tiles.
    """
    all_of_them = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in choices]
    return all_of_them[:1] if INTERPRETED else all_of_them


def _only_the_first(choices: list[triton.Config], *_: Any, **__: Any) -> list[triton.Config]:
    return choices[:1] if torch.are_deterministic_algorithms_enabled() else choices


@triton.constexpr_function
def _number(scalar):
    return int(scalar.handle.data.item())


@triton.jit
def times(number):
    """A number that a kernel counts to, no constant; NumPy 2.4 refuses what the interpreter does with it."""
    if WIDEN:
        return _number(number)
    return number


# For `triton.autotune`: with deterministic algorithms the same configuration in every process.
PRUNE = {"early_config_prune": _only_the_first}


def packed(t: Tensor, dims: int) -> Tensor:
    """`t` with its last `dims` dimensions side by side in memory; a view of one projection stays the view it is."""
    expected = 1
    for size, stride in zip(reversed(t.shape[-dims:]), reversed(t.stride()[-dims:]), strict=True):
        if size != 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t
