"""All between a Mamba-2 layer's two projections as one function in plain torch: convolution, scan, norm and gate.

The sequence is taken in blocks that fit the cache, each from the projection to the output while it is there, and back
in the backward, where what the convolution made of a block is computed again. Kept are y, the state before each chunk
and one number per token and group of the norm; nothing is split, padded or put together again.

Views of tensors made in inference mode cost half as much; what outlives a call is made outside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.ops.causal_conv1d import cpu as conv
from megatron_ext.ops.gated_norm import cpu as norm
from megatron_ext.ops.mamba_mixer.projection import Projection
from megatron_ext.ops.silu import is_silu, silu_and_derivative
from megatron_ext.ops.ssd.cpu import CHUNK, boundary_states, document_starts
from megatron_ext.ops.ssd.cpu_chunks import Scan, ScanGradAccumulator
from megatron_ext.ops.ssd.cpu_decays import Decays
from megatron_ext.ops.ssd.step_sizes import NO_LIMIT, step_sizes


@dataclass(frozen=True)
class _Options:
    """The arguments that are no tensors."""

    projection: Projection
    limit: Sequence[float]
    silu: bool
    eps: float
    norm_before_gate: bool
    chunk: int


def conv_scan_norm(
    zxbcdt: Float[Tensor, "b l in_proj"],
    conv_weight: Float[Tensor, "d w"],
    conv_bias: Float[Tensor, "d"] | None,
    dt_bias: Float[Tensor, "h"],
    A: Float[Tensor, "h"],
    D: Float[Tensor, "h"] | Float[Tensor, "h p"],
    projection: Projection,
    initial_states: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    dt_limit: Sequence[float] = NO_LIMIT,
    activation: str | None = "silu",
    norm_weight: Float[Tensor, "hp"] | None = None,
    norm_eps: float = 1e-6,
    norm_before_gate: bool = True,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b l hp"], Float[Tensor, "b h p n"]]:
    """norm(y) silu(z), norm(y silu(z)) or y silu(z), of the scan y of what the convolution makes of x, B and C.

    Step sizes are softplus(dt + bias). Accumulated in float32 (float64 for float64 inputs).

    Args:
        zxbcdt: Gate z, inputs x, B, C and raw step sizes side by side.
        conv_weight: Taps of the convolution over x, B and C.
        conv_bias: Its bias.
        dt_bias: Added to the step sizes before softplus.
        A: Decay rates, negative.
        D: Skip weights, per head or per channel.
        projection: The sizes of the parts of zxbcdt.
        initial_states: The state before the first token; it belongs to the first document of a row.
        seq_idx: Document number of each token; neither state nor taps cross into another document.
        dt_limit: Step sizes are clamped to this range after softplus.
        activation: Of the convolution: None, "silu" or "swish".
        norm_weight: Of the norm over each group's channels; no norm without it.
        norm_eps: Added to its mean square.
        norm_before_gate: norm(y) silu(z) if true, norm(y silu(z)) if false.
        chunk_size: Tokens in a chunk of the scan. It changes the speed, not the result.

    Returns:
        The output in the dtype of the input, and the state after the last token in float32 (float64 for float64).

    Raises:
        ConfigError: Another activation.
    """
    size = min(chunk_size or CHUNK, zxbcdt.shape[1])
    options = _Options(projection, dt_limit, is_silu(activation), norm_eps, norm_before_gate, size)
    return _Mixer.apply(  # type: ignore[return-value]
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, initial_states, norm_weight, seq_idx, options
    )


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zxbcdt, weight, bias, dt_bias, A, D, initial, norm_weight, seq_idx, options):
        z, xBC, dt = options.projection.parts(zxbcdt)
        scan, convolution = _new_scan(zxbcdt, options), _Convolution(xBC, weight, bias, seq_idx)
        starts = None if seq_idx is None else document_starts(seq_idx)
        decay = scan.decays(step_sizes(dt, dt_bias, True, options.limit), A, starts)
        states = scan.states(initial, zxbcdt, (weight.shape[0] - options.projection.inner) // (2 * scan.groups))
        skip, factor = scan.skip(D), None if norm_weight is None else norm_weight.to(scan.dtype)
        y = torch.empty(z.shape, dtype=scan.dtype, device=z.device)
        out = torch.empty_like(z)  # in the order of the input in memory, as its gradient
        scale = y.new_empty(*z.shape[:2], scan.groups, 1)
        group_size = z.shape[2] // scan.groups
        with torch.inference_mode():
            for rows, chunks, tokens in scan.blocks(z.device):
                k = rows, tokens
                yk, zk, (_, _, convolved) = y[k], z[k].to(scan.dtype), convolution.of(*k)
                convolved = F.silu(convolved, inplace=True) if options.silu else convolved
                scan.forward(convolved, skip, decay.of(rows, chunks), boundary_states(states, rows, chunks), yk)
                if factor is None:
                    torch.mul(yk, F.silu(zk), out=out[k])
                else:
                    scale[k] = norm.forward(yk, factor, zk, options.eps, group_size, options.norm_before_gate, out[k])
        ctx.save_for_backward(zxbcdt, weight, bias, dt_bias, A, D, norm_weight, seq_idx, y, states, scale, *decay)
        ctx.options, ctx.has_initial = options, initial is not None
        ctx.set_materialize_grads(False)
        return out, scan.from_layout(states[:, -1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dfinal):  # type: ignore[override]
        zxbcdt, weight, bias, dt_bias, A, D, norm_weight, seq_idx, y, states, scale, *decay = ctx.saved_tensors
        options: _Options = ctx.options
        z, xBC, dt = options.projection.parts(zxbcdt)
        dout = torch.zeros_like(y) if dout is None else dout
        dzxbcdt = torch.empty_like(zxbcdt)
        dz, dxBC, ddt = options.projection.parts(dzxbcdt)
        scan, convolution, decay = _new_scan(zxbcdt, options), _Convolution(xBC, weight, bias, seq_idx), Decays(*decay)
        scan_grads, conv_grads = ScanGradAccumulator(scan, dfinal, states, A, D), conv.ConvGradAccumulator(weight, xBC)
        with torch.enable_grad():
            raw, raw_bias = dt.detach().requires_grad_(), dt_bias.detach().requires_grad_()
            steps = step_sizes(raw, raw_bias, True, options.limit)
        dsteps, factor = torch.empty_like(steps), None if norm_weight is None else norm_weight.to(scan.dtype)
        dfactor = None if factor is None else torch.zeros_like(factor)
        with torch.inference_mode():
            for rows, chunks, tokens in reversed(list(scan.blocks(z.device))):
                k = rows, tokens
                yk, zk, dyk = y[k], z[k].to(scan.dtype), dout[k].to(scan.dtype)
                if factor is None or dfactor is None:
                    gate, derivative = silu_and_derivative(zk)
                    torch.mul(derivative.mul_(dyk), yk, out=dz[k])
                    dyk = gate.mul_(dyk)
                else:
                    dyk, dfactor_block = norm.backward(yk, factor, zk, scale[k], dyk, options.norm_before_gate, dz[k])
                    dfactor.add_(dfactor_block)
                inputs, same_document, convolved = convolution.of(*k)
                derivative = None
                if options.silu:
                    convolved, derivative = silu_and_derivative(convolved, in_place=True)
                block_state = decay.of(rows, chunks), boundary_states(states, rows, chunks)
                dconvolved, dsteps[k] = scan.backward(convolved, yk, dyk, *block_state, scan_grads, rows)
                if derivative is not None:
                    dconvolved.mul_(derivative)
                dxBC[k] = conv_grads.add(inputs, dconvolved, convolution.taps, same_document, rows)
        ddt[:], ddt_bias = torch.autograd.grad(steps, (raw, raw_bias), dsteps)
        return (
            dzxbcdt, conv_grads.weight.T.to(weight.dtype), None if bias is None else conv_grads.bias.to(bias.dtype),
            ddt_bias, scan_grads.dA.to(A.dtype), scan_grads.dD.to(D.dtype),
            scan.from_layout(scan_grads.state) if ctx.has_initial else None,
            None if dfactor is None or norm_weight is None else dfactor.to(norm_weight.dtype), None, None,
        )  # fmt: skip


def _new_scan(zxbcdt: Tensor, options: _Options) -> Scan:
    p, (batch, length, _) = options.projection, zxbcdt.shape
    return Scan(batch, length, p.heads, p.channels, p.groups, options.chunk, conv.accumulation_dtype(zxbcdt))


class _Convolution:
    """The convolution of a sequence, block by block."""

    def __init__(self, xBC: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> None:
        self.xBC, self.taps = xBC, conv.Taps.of(weight, bias, conv.accumulation_dtype(xBC))
        self.same_document = None if seq_idx is None else conv.same_document(seq_idx, weight.shape[1])

    def of(self, rows: slice, tokens: slice) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """The shifted inputs, whether they are of the same document, and what the activation is taken of."""
        same_document = conv.block_mask(self.same_document, rows, tokens)
        inputs = conv.shifted_inputs(self.xBC[rows], None, len(self.taps.rows), tokens, same_document)
        return inputs, same_document, self.taps.pre_activation(inputs)
