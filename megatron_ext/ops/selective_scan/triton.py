"""The selective scan as two fused Triton kernels, forward and backward, with step sizes, skip and gate in them.

Kept for the backward are the inputs, and the state before each chunk in float32.
"""

# A launch takes numbers for constants, and num_warps, whatever Triton's annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.ops.selective_scan import triton_kernels
from megatron_ext.ops.selective_scan.cpu import check_length
from megatron_ext.ops.triton_jit import packed
from megatron_ext.ops.triton_tiles import cdiv, next_power_of_two

# Tokens in a chunk, and states of its channels: at 32 tokens the backward spills 448 bytes a thread on Hopper.
CHUNK, STATES = 16, 128


def selective_scan(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, "d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    dt_bias: Float[Tensor, "d"] | None = None,
    initial_states: Float[Tensor, "b d n"] | None = None,
    dt_softplus: bool = False,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """The scan of `naive.selective_scan`, differentiable once, computed in float32; see there for the arguments.

    Any of them may be part of one projection: only last dimensions must be packed. `chunk_size`, a power of two,
    changes speed and memory, not the result.

    Returns:
        y in the dtype of x, and the state after the last token in float32.

    Raises:
        ConfigError: The sequence is empty.
    """
    check_length(x)
    own = [None if t is None else packed(t, 1) for t in (x, dt, A, B, C, D, z, dt_bias)]
    initial = None if initial_states is None else initial_states.contiguous()
    return _SelectiveScan.apply(*own, initial, dt_softplus, chunk_size or CHUNK)  # type: ignore[return-value]


def _sizes(A: Tensor, softplus: bool, chunk: int) -> dict[str, Any]:
    states = next_power_of_two(A.shape[1])
    channels = min(next_power_of_two(A.shape[0]), max(1, STATES // states))
    return {"N": A.shape[1], "SOFTPLUS": softplus, "CHUNK": chunk, "BLOCK": channels, "BLOCK_N": states}


def _strides(*tensors: Tensor | None) -> list[int]:
    """Of rows and of tokens."""
    return [stride for t in tensors for stride in ((0, 0) if t is None else t.stride()[:2])]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, D, z, bias, initial, softplus, chunk):
        (batch, length, channels), chunks = x.shape, cdiv(x.shape[1], chunk)
        sizes, floats = _sizes(A.contiguous(), softplus, chunk), {"dtype": torch.float32, "device": x.device}
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        states = torch.empty(batch, chunks, *A.shape, **floats)
        final = torch.empty(batch, *A.shape, **floats)
        triton_kernels.forward_kernel[(cdiv(channels, sizes["BLOCK"]), batch)](
            x, dt, A.contiguous(), B, C, D, z, bias, initial, y, states, final,
            *_strides(x, dt, B, C, z), length, channels, chunks, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(x, dt, A, B, C, D, z, bias, states)
        ctx.sizes, ctx.has_initial = sizes, initial is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dfinal):  # type: ignore[override]
        x, dt, A, B, C, D, z, bias, states = ctx.saved_tensors
        (batch, length, channels), floats = x.shape, {"dtype": torch.float32, "device": x.device}
        programs = cdiv(channels, ctx.sizes["BLOCK"])
        dy = torch.zeros_like(x) if dy is None else packed(dy, 1)
        dx, ddt = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt))
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        dA = torch.empty(batch, *A.shape, **floats)
        dB, dC = (torch.empty(batch, programs, length, A.shape[1], **floats) for _ in range(2))
        dD, dbias = (None if t is None else torch.empty(batch, channels, **floats) for t in (D, bias))
        dinitial = torch.empty(batch, *A.shape, **floats) if ctx.has_initial else None
        triton_kernels.backward_kernel[(programs, batch)](
            x, dt, A.contiguous(), B, C, D, z, bias, states, dy, None if dfinal is None else dfinal.contiguous(),
            dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial,
            *_strides(x, dt, B, C, z, dy), length, channels, states.shape[1], **ctx.sizes,
        )  # fmt: skip
        dA, dD, dbias = (None if t is None else t.sum(0).to(of.dtype) for t, of in ((dA, A), (dD, D), (dbias, bias)))
        return dx, ddt, dA, dB.sum(1).to(B.dtype), dC.sum(1).to(C.dtype), dD, dz, dbias, dinitial, None, None
