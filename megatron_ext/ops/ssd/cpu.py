"""The chunked state-space scan (SSD) in plain torch, with a hand-written backward: any device, no compiler.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,   y_t = S_t C_t + D x_t        (each head by itself)

Inside a chunk the recurrence is a masked matrix product; between chunks the state is handed on (Mamba-2, arXiv
2405.21060, section 6). What makes it fast on a CPU:

- the heads of a group share one wide matrix product with B or C;
- dt is folded into the tile of decays, the causal mask into C B^T, so x is not rescaled inside a chunk;
- chunks are worked on in blocks that fit the cache. Only y and the state before each chunk are kept for the backward,
  which builds the tiles again: memory is linear in the sequence;
- the gradient of the log-decay is dy.y - x.dx per token, without an L x L reduction (`cpu_chunks.ScanGradAccumulator`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.errors import ConfigError
from megatron_ext.ops.ssd.cpu_chunks import Scan, ScanGradAccumulator

# Tokens in a chunk. States kept for the backward are one per chunk; a tile is as many numbers per token.
CHUNK = 32


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
    """The scan of `naive.ssd`, differentiable once, accumulated in float32 (float64 for float64 inputs).

    Args:
        x: Inputs.
        dt: Step sizes, after bias and softplus; not negative.
        A: Decay rates, negative.
        B: Input projections, one per group of h / g heads.
        C: Output projections, one per group of heads.
        D: Skip weights, per head or per channel.
        initial_states: The state before the first token (zero by default).
        seq_idx: Document number of each token; the state is forgotten where it changes.
        chunk_size: Tokens in a chunk. It changes the speed, not the result; by default `CHUNK`.

    Returns:
        y in the dtype of x, and the state after the last token in float32 (float64 for float64 inputs).

    Raises:
        ConfigError: The heads do not divide into the groups, or the sequence is empty.
    """
    length, heads, groups = x.shape[1], x.shape[2], B.shape[2]
    if heads % groups:
        raise ConfigError("the heads of a state-space layer do not divide into its groups", got=f"{heads} / {groups}")
    if length == 0:
        raise ConfigError("a state-space scan needs at least one token", got=tuple(x.shape))
    size = min(chunk_size or CHUNK, length)
    starts = None if seq_idx is None else document_starts(seq_idx)
    return _SSD.apply(x, dt, A, B, C, D, initial_states, starts, size)  # type: ignore[return-value]


def document_starts(seq_idx: Int[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
    """Where the document number changes."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, D, initial, starts, size):
        batch, length, heads, channels = x.shape
        scan = Scan(batch, length, heads, channels, B.shape[2], size, torch.promote_types(x.dtype, torch.float32))
        decay, states, skip = scan.decays(dt, A, starts), scan.states(initial, B, B.shape[3]), scan.skip(D)
        y = torch.empty(x.shape, dtype=scan.dtype, device=x.device)
        for rows, chunks, tokens in scan.blocks(x.device):
            k, block_states = (rows, tokens), boundary_states(states, rows, chunks)
            xBC = _concatenate(scan, x[k], B[k], C[k])
            scan.forward(xBC, skip, decay.of(rows, chunks), block_states, y[k].flatten(2))
        ctx.save_for_backward(x, dt, A, B, C, D, starts, y, states)
        ctx.scan, ctx.has_initial = scan, initial is not None
        ctx.set_materialize_grads(False)
        return y.to(x.dtype), scan.from_layout(states[:, -1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dfinal):  # type: ignore[override]
        x, dt, A, B, C, D, starts, y, states = ctx.saved_tensors
        scan: Scan = ctx.scan
        dy = torch.zeros_like(x) if dy is None else dy
        decay, grads = scan.decays(dt, A, starts), ScanGradAccumulator(scan, dfinal, states, A, D)
        dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        for rows, chunks, tokens in reversed(list(scan.blocks(x.device))):
            k = rows, tokens
            outputs = y[k].flatten(2), dy[k].flatten(2).to(scan.dtype)
            block_states = decay.of(rows, chunks), boundary_states(states, rows, chunks)
            dxBC, ddt[k] = scan.backward(_concatenate(scan, x[k], B[k], C[k]), *outputs, *block_states, grads, rows)
            dx[k], dB[k], dC[k] = scan.inputs(dxBC)
        dinitial = scan.from_layout(grads.state) if ctx.has_initial else None
        return dx, ddt, grads.dA.to(A.dtype), dB, dC, None if D is None else grads.dD.to(D.dtype), dinitial, None, None


def boundary_states(states: Float[Tensor, "b s g n rp"], rows: slice, chunks: slice) -> Float[Tensor, "k t g n rp"]:
    """The states before and after each of some chunks."""
    return states[rows, chunks.start : chunks.stop + 1]


def _concatenate(
    scan: Scan, x: Float[Tensor, "b t h p"], B: Float[Tensor, "b t g n"], C: Float[Tensor, "b t g n"]
) -> Float[Tensor, "b t conv"]:
    return torch.cat([t.flatten(2) for t in (x, B, C)], -1).to(scan.dtype)
