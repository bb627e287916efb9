"""All between a Mamba-2 layer's two projections as one function: convolution, scan and gate, from and into one tensor.

The parts of the input projection are read where they lie and their gradients written where they belong, so that nothing
is split, padded or put together again. The convolution is computed again in the backward instead of kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.ssm.naive import is_silu
from megatron_ext.ssm.triton import conv, scan
from megatron_ext.ssm.triton._jit import packed
from megatron_ext.ssm.triton.scan import Gradients, Saved, Steps


def conv_scan_gate(
    zxbcdt: Float[Tensor, "b l in_proj"],
    conv_weight: Float[Tensor, "d w"],
    conv_bias: Float[Tensor, "d"] | None,
    dt_bias: Float[Tensor, "h"],
    A: Float[Tensor, "h"],
    D: Float[Tensor, "h"] | Float[Tensor, "h p"],
    channels: int,
    groups: int,
    initial_states: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    dt_limit: Sequence[float] = scan.NO_LIMIT,
    activation: str | None = "silu",
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b l hp"], Float[Tensor, "b h p n"]]:
    """silu(z) times the scan of what the convolution makes of x, B and C, with the step sizes softplus(dt + bias).

    Args:
        zxbcdt: Gate z, inputs x, B, C and raw step sizes side by side, of h p, h p, g n, g n and h channels.
        conv_weight: Taps of the convolution over x, B and C, four at most.
        conv_bias: Its bias.
        dt_bias: Added to the step sizes before softplus.
        A: Decay rates, negative.
        D: Skip weights, per head or per channel.
        channels: p.
        groups: g.
        initial_states: The state before the first token; it belongs to the first document of a row.
        seq_idx: Document number of each token; neither state nor taps cross into another document.
        dt_limit: Step sizes are clamped to this range after softplus.
        activation: Of the convolution: None, "silu" or "swish".
        chunk_size: Tokens in a chunk of the scan, a power of two. It changes the speed, not the result.

    Returns:
        The gated output in the dtype of the input, and the state after the last token in float32.

    Raises:
        ConfigError: Another activation, or sizes the scan cannot take.
    """
    heads = A.shape[0]
    D = D.float() if D.dim() == 2 else D.float().unsqueeze(1).expand(-1, channels)
    initial = None if initial_states is None else initial_states.contiguous()
    numbers = None if seq_idx is None else seq_idx.int().contiguous()
    return _Mixer.apply(  # type: ignore[return-value]
        packed(zxbcdt, 1), conv_weight.contiguous(), conv_bias, dt_bias, A, D.contiguous(), initial, numbers,
        (heads, channels, groups), dt_limit, is_silu(activation), chunk_size,
    )  # fmt: skip


def _parts(zxbcdt: Tensor, sizes: tuple[int, int, int]) -> list[Tensor]:
    """z (b l h p), x B C together, and dt."""
    heads, channels, _ = sizes
    inner = heads * channels
    z, xBC, dt = zxbcdt.split([inner, zxbcdt.shape[-1] - inner - heads, heads], -1)
    return [z.unflatten(-1, (heads, channels)), xBC, dt]


def _split(xBC: Tensor, sizes: tuple[int, int, int]) -> list[Tensor]:
    """x (b l h p), B and C (b l g n)."""
    heads, channels, groups = sizes
    inner = heads * channels
    state = (xBC.shape[-1] - inner) // 2
    x, B, C = xBC.split([inner, state, state], -1)
    return [x.unflatten(-1, (heads, channels)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))]


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zxbcdt, weight, bias, dt_bias, A, D, initial, seq_idx, sizes, limit, silu, chunk_size):
        z, xBC, dt = _parts(zxbcdt, sizes)
        x, B, C = _split(conv.forward(xBC, None, weight, bias, seq_idx, silu), sizes)
        t = scan.tiles(x, B, chunk_size)
        keep = any(ctx.needs_input_grad)
        steps = Steps(dt_bias, True, limit)
        y, out, final, saved = scan.forward(t, x, dt, A, B, C, D, z, steps, initial, seq_idx, keep)
        assert out is not None  # there is a gate
        if keep:
            kept = (saved.step, saved.total, saved.states, saved.doc)
            ctx.save_for_backward(zxbcdt, weight, bias, dt_bias, A, D, seq_idx, y, *kept)
        ctx.tiles, ctx.sizes, ctx.limit, ctx.silu, ctx.has_initial = t, sizes, limit, silu, initial is not None
        ctx.set_materialize_grads(False)
        return out.flatten(2), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dfinal):  # type: ignore[override]
        zxbcdt, weight, bias, dt_bias, A, D, seq_idx, y, *kept = ctx.saved_tensors
        z, xBC, dt = _parts(zxbcdt, ctx.sizes)
        convolved = conv.forward(xBC, None, weight, bias, seq_idx, ctx.silu)
        x, B, C = _split(convolved, ctx.sizes)
        dzxbcdt = torch.empty(zxbcdt.shape, dtype=zxbcdt.dtype, device=zxbcdt.device)
        dz, dxBC, ddt = _parts(dzxbcdt, ctx.sizes)
        dconvolved = torch.empty_like(convolved)
        dx, dB, dC = _split(dconvolved, ctx.sizes)
        dout = torch.zeros_like(y) if dout is None else packed(dout, 1).unflatten(-1, y.shape[2:])
        dfinal = None if dfinal is None else dfinal.contiguous()
        dA, dD, ddt_bias, dinitial = scan.backward(
            ctx.tiles, Saved(*kept), x, dt, A, B, C, D, z, y, Steps(dt_bias, True, ctx.limit), dout, dfinal,
            Gradients(dx, ddt, dB, dC, dz), ctx.has_initial,
        )  # fmt: skip
        assert ddt_bias is not None  # there is a bias
        _, dweight, dbias = conv.backward(xBC, None, weight, bias, seq_idx, ctx.silu, dconvolved, dxBC)
        dbias = None if dbias is None else dbias.to(bias.dtype)
        return (
            dzxbcdt, dweight.to(weight.dtype), dbias, ddt_bias.to(dt_bias.dtype), dA.to(A.dtype), dD, dinitial,
            None, None, None, None, None,
        )  # fmt: skip
