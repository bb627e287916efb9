"""The chunked state-space scan (SSD) in fused Triton kernels, forward and backward.

What is kept for the backward: the inputs, y where it is gated, step sizes and decays (8 bytes a token and head), and
the state before each chunk in the dtype of the inputs, in which the matrix units would read it anyway.
"""

# A launch takes numbers for constants, and num_warps, whatever Triton's annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.ops.ssd import (
    triton_backward_kernels,
    triton_decay_kernels,
    triton_forward_kernels,
    triton_state_kernels,
)
from megatron_ext.ops.ssd.step_sizes import NO_LIMIT
from megatron_ext.ops.ssd.triton_tiling import ScanTiling, scan_tiling
from megatron_ext.ops.triton_jit import packed
from megatron_ext.ops.triton_tiles import cdiv, tile_side


@dataclass(frozen=True)
class StepSizes:
    """The step sizes of a scan: clamp(softplus(raw + bias)), or raw itself."""

    bias: Tensor | None = None
    softplus: bool = False
    limit: Sequence[float] = NO_LIMIT


def documents(seq_idx: Int[Tensor, "b l"], padded: int) -> Int[Tensor, "b padded"]:
    """Numbers that grow by one where a document begins; the padding belongs to the last one."""
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    numbers = starts.cumsum(1, dtype=torch.int32)
    return F.pad(numbers[:, None].float(), (0, padded - numbers.shape[1]), mode="replicate")[:, 0].int()


@dataclass(frozen=True)
class Saved:
    """What the forward leaves for the backward, beside its inputs."""

    step: Tensor
    total: Tensor
    states: Tensor
    doc: Tensor | None


def forward(
    t: ScanTiling,
    x: Float[Tensor, "b l h p"],
    raw: Float[Tensor, "b l h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, "h p"] | None,
    z: Float[Tensor, "b l h p"] | None,
    steps: StepSizes,
    initial: Float[Tensor, "b h p n"] | None,
    seq_idx: Int[Tensor, "b l"] | None,
    keep_y: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Saved]:
    """y (None if it is neither returned nor kept), y silu(z) (None without a gate), the final state, and what is saved.

    x, B, C, z and raw may be parts of one projection: only their last dimensions must be packed.
    """
    floats = {"dtype": torch.float32, "device": x.device}
    step, total = (torch.empty(t.batch, t.heads, t.padded, **floats) for _ in range(2))
    side = min(16, tile_side(t.heads))
    triton_decay_kernels.decay_kernel[(t.chunks, cdiv(t.heads, side), t.batch)](
        raw, steps.bias, A, step, total,
        raw.stride(0), raw.stride(1), *steps.limit, t.length, t.padded,
        HEADS=t.heads, SOFTPLUS=steps.softplus, CHUNK=t.chunk, BLOCK=side,
    )  # fmt: skip
    doc = None if seq_idx is None else documents(seq_idx, t.padded)
    states = torch.empty(t.batch, t.chunks, t.heads, t.state, t.channels, dtype=x.dtype, device=x.device)
    final = torch.empty(t.batch, t.heads, t.channels, t.state, **floats)
    part, run = t.channel_block(), t.run()
    parts, runs = cdiv(t.channels, part), cdiv(t.chunks, run)
    own, kept = _between(t, runs, x.device)
    for measure in (True, False) if runs > 1 else (False,):
        triton_state_kernels.states_kernel[(parts * (runs - measure), t.heads, t.batch)](
            x, B, step, total, doc, initial, *((None, None) if measure else (states, final)), own, kept,
            x.stride(0), x.stride(1), B.stride(0), B.stride(1), t.length, t.chunks, run,
            **t.constants, BLOCK_P=part, BLOCK_N=tile_side(t.state), PARTS=parts, MEASURE=measure,
        )  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep_y or z is None else None
    out = None if z is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads_per_program = t.heads_per_program()
    triton_forward_kernels.scan_kernel[(t.padded // t.rows, t.heads // heads_per_program, t.batch)](
        x, B, C, D, z, step, total, doc, states, y, out,
        x.stride(0), x.stride(1), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
        *(z.stride()[:2] if z is not None else (0, 0)), t.length, t.chunks,
        **t.constants, HEADS_PER_PROGRAM=heads_per_program, ROWS=t.rows,
        BLOCK_P=tile_side(t.channels), BLOCK_N=tile_side(t.state),
    )  # fmt: skip
    return y, out, final, Saved(step, total, states, doc)


def _between(t: ScanTiling, runs: int, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What the first of two passes leaves to the second: states that runs of chunks make, and what they keep of one."""
    if runs == 1:
        return None, None
    floats = {"dtype": torch.float32, "device": device}
    of_runs = (t.batch, t.heads, runs)
    return torch.empty(*of_runs, t.state, t.channels, **floats), torch.empty(of_runs, **floats)


@dataclass(frozen=True)
class Gradients:
    """Where the backward writes: tensors of the inputs' shapes, or parts of one gradient of a projection."""

    x: Tensor
    raw: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None = None


def backward(
    t: ScanTiling,
    saved: Saved,
    x: Float[Tensor, "b l h p"],
    raw: Float[Tensor, "b l h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, "h p"] | None,
    z: Float[Tensor, "b l h p"] | None,
    y: Float[Tensor, "b l h p"] | None,
    steps: StepSizes,
    dout: Float[Tensor, "b l h p"],
    dfinal: Float[Tensor, "b h p n"] | None,
    into: Gradients,
    needs_initial: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Write the gradients `into`; return those of A, of D per channel, of the bias, and of the initial state."""
    floats = {"dtype": torch.float32, "device": x.device}
    dstates = torch.empty_like(saved.states)
    dy = dout if z is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dinitial = torch.empty(t.batch, t.heads, t.channels, t.state, **floats) if needs_initial else None
    part, run = t.channel_block(), t.run()
    parts, runs, row_blocks = cdiv(t.channels, part), cdiv(t.chunks, run), t.padded // t.rows
    carried = torch.empty(t.batch, t.heads, parts, t.chunks, **floats)
    own, kept = _between(t, runs, x.device)
    for measure in (True, False) if runs > 1 else (False,):
        written = (None,) * 5 if measure else (dstates, dy, into.z, dinitial, carried)
        triton_state_kernels.states_backward_kernel[(parts * (runs - measure), t.heads, t.batch)](
            C, dout, z, None if measure else y, saved.total, saved.doc, None if measure else saved.states, dfinal,
            *written, own, kept, C.stride(0), C.stride(1), dout.stride(0), dout.stride(1),
            *(z.stride()[:2] if z is not None else (0, 0)), *(into.z.stride()[:2] if into.z is not None else (0, 0)),
            t.length, t.chunks, run,
            **t.constants, BLOCK_P=part, BLOCK_N=tile_side(t.state), PARTS=parts, MEASURE=measure,
        )  # fmt: skip
    target, arriving = (torch.empty(t.batch, t.heads, t.padded, **floats) for _ in range(2))
    source = torch.empty(t.batch, t.heads, t.chunk // t.rows, t.padded, **floats)
    dD = None if D is None else torch.empty(t.batch, row_blocks, t.heads, t.channels, **floats)
    triton_backward_kernels.scan_backward_kernel[(2 * row_blocks, t.groups, t.batch)](
        x, B, C, D, dy, saved.step, saved.total, saved.doc, saved.states, dstates,
        into.x, into.B, into.C, dD, target, source, arriving,
        x.stride(0), x.stride(1), B.stride(0), B.stride(1), C.stride(0), C.stride(1), dy.stride(0), dy.stride(1),
        into.x.stride(0), into.x.stride(1), into.B.stride(0), into.B.stride(1), into.C.stride(0), into.C.stride(1),
        t.length, t.chunks,
        **t.constants, ROWS=t.rows, BLOCK_P=tile_side(t.channels), BLOCK_N=tile_side(t.state),
    )  # fmt: skip
    dA = torch.empty(t.batch, t.chunks, t.heads, **floats)
    dbias = None if steps.bias is None else torch.empty_like(dA)
    side = min(16, tile_side(t.heads))
    triton_decay_kernels.decay_backward_kernel[(t.chunks, cdiv(t.heads, side), t.batch)](
        raw, steps.bias, A, saved.step, target, source, arriving, carried, into.raw, dA, dbias,
        raw.stride(0), raw.stride(1), into.raw.stride(0), into.raw.stride(1), *steps.limit, t.length, t.padded,
        HEADS=t.heads, SOFTPLUS=steps.softplus, CHUNK=t.chunk, BLOCK=side,
        SOURCES=t.chunk // t.rows, CARRIERS=parts,
    )  # fmt: skip
    return (
        dA.sum((0, 1)),
        None if dD is None else dD.sum((0, 1)),
        None if dbias is None else dbias.sum((0, 1)),
        dinitial,
    )


def ssd(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, "h"] | Float[Tensor, "h p"] | None = None,
    initial_states: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b l"] | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """The scan of `naive.ssd`, differentiable once, accumulated in float32.

    Matrix products take their operands in the dtype of x; sums, decays and the state on its way are float32.

    Args:
        x: Inputs, bfloat16, float16 or float32; B and C are cast to its dtype.
        dt: Step sizes, after bias and softplus; not negative.
        A: Decay rates, negative.
        B: Input projections, one per group of h / g heads.
        C: Output projections, one per group of heads.
        D: Skip weights, per head or per channel.
        initial_states: The state before the first token (zero by default).
        seq_idx: Document number of each token; the state is forgotten where it changes.
        chunk_size: Tokens in a chunk, a power of two; fewer where they would not fit. It changes the speed, not the
            result.

    Returns:
        y in the dtype of x, and the state after the last token in float32.

    Raises:
        ConfigError: The heads do not divide into the groups, the sequence is empty, or the chunk is no tile.
    """
    t = scan_tiling(x, B, chunk_size)
    x, B, C = (packed(each.to(x.dtype), 2) for each in (x, B, C))
    D = _per_channel(D, t)
    initial_states = None if initial_states is None else initial_states.contiguous()
    return _SSD.apply(x, packed(dt, 1), A, B, C, D, initial_states, seq_idx, t)  # type: ignore[return-value]


def _per_channel(D: Tensor | None, t: ScanTiling) -> Tensor | None:
    if D is None or D.dim() == 2:
        return None if D is None else D.contiguous()
    return D.unsqueeze(1).expand(-1, t.channels).contiguous()


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, D, initial, seq_idx, t):
        y, _, final, saved = forward(t, x, dt, A, B, C, D, None, StepSizes(), initial, seq_idx, True)
        ctx.save_for_backward(x, dt, A, B, C, D, saved.step, saved.total, saved.states, saved.doc)
        ctx.tiling, ctx.has_initial = t, initial is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dfinal):  # type: ignore[override]
        x, dt, A, B, C, D, *saved = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else packed(dy, 2)
        into = Gradients(*(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C)))
        dfinal = None if dfinal is None else dfinal.contiguous()
        dA, dD, _, dinitial = backward(
            ctx.tiling, Saved(*saved), x, dt, A, B, C, D, None, None, StepSizes(), dy, dfinal, into, ctx.has_initial
        )
        dD = None if dD is None else dD.to(D.dtype)
        return into.x, into.raw, dA.to(A.dtype), into.B, into.C, dD, dinitial, None, None
