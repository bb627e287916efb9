"""Compile one small Triton kernel for an H100, with the compiler cache that the environment asks for."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def double(x, size: tl.constexpr):
    at = x + tl.arange(0, size)
    tl.store(at, 2 * tl.load(at))


kernel = triton.compile(
    ASTSource(double, {"x": "*fp32", "size": "constexpr"}, {"size": 128}), target=GPUTarget("cuda", 90, 32)
)
print(len(kernel.asm["ptx"]))
