"""The chunked state-space scan (SSD) in plain torch, with a hand-written backward: any device, no compiler.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,   y_t = S_t C_t + D x_t        (each head by itself)

Inside a chunk the recurrence is a masked matrix product; between chunks the state is handed on (Mamba-2, arXiv
2405.21060, section 6). What makes it fast on a CPU:

- the heads of a group share one wide matrix product with B or C;
- dt is folded into the tile of decays, the causal mask into C B^T, so x is not rescaled inside a chunk;
- chunks are worked on in blocks that fit the cache. Only y and the state before each chunk are kept for the backward,
  which builds the tiles again: memory is linear in the sequence;
- the gradient of the log-decay is dy.y - x.dx per token, without an L x L reduction. Its error is that of dy.y in
  float32, also where the state is forgotten at once and the gradient itself is next to nothing.

Shapes: b batch, l = c L tokens in c chunks, h = g r heads in g groups, p head channels, n state size.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.errors import ConfigError
from megatron_ext.ssm._blocks import blocks
from megatron_ext.ssm._decay import Decays, decays, fill_tile

# Tokens in a chunk. From 32 to 96 the speed on a CPU is the same; states kept for the backward are one per chunk.
CHUNK = 64


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
    starts = None
    if seq_idx is not None:
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    if pad := -length % size:  # dt = 0 and x = 0: the padding leaves the state as it is
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
        starts = None if starts is None else F.pad(starts, (0, pad))
    y, state = _SSD.apply(x, dt, A, B, C, D, initial_states, starts, size)  # type: ignore[misc]
    return y[:, :length], state


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, D, initial, starts, size):
        b, length, h, p = x.shape
        g, n = B.shape[2:]
        c, dtype = length // size, torch.promote_types(x.dtype, torch.float32)
        xs = x.reshape(b, c, size, h, p)
        Bs, Cs = (_by_group(t, c, dtype) for t in (B, C))
        decay = _decays(dt, A, starts, c, g, p, dtype)
        states = torch.empty(b, c + 1, g, n, h // g * p, dtype=dtype, device=x.device)
        states[:, 0] = 0 if initial is None else _wide(initial, g)
        y = torch.empty(b, c, size, h, p, dtype=dtype, device=x.device)
        for rows, chunks in _blocks(b, c, h, size, x.device):
            k = (rows, chunks)
            xk = xs[k]
            added = Bs[k].mT @ _heads_together(xk * decay.to_end[k].unsqueeze(-1), g)
            for i, chunk in enumerate(range(chunks.start, chunks.stop)):
                torch.addcmul(added[:, i], states[rows, chunk], decay.whole[rows, chunk], out=states[rows, chunk + 1])
            tile = xk.new_empty(*xk.shape[:2], h, size, size, dtype=dtype)
            fill_tile(tile, decay.target[k], decay.source[k])
            tile.unflatten(2, (g, -1)).mul_((Cs[k] @ Bs[k].mT).tril_().unsqueeze(3))
            within = (tile @ xk.transpose(2, 3).to(dtype)).transpose(2, 3)
            before = _heads_apart(Cs[k] @ states[k], h)
            yk = torch.addcmul(within, before, decay.from_start[k].unsqueeze(-1), out=y[k])
            if D is not None:
                yk.addcmul_(xk, _per_channel(D))
        y = y.view(b, length, h, p)
        ctx.save_for_backward(x, dt, A, B, C, D, starts, y, states)
        ctx.size, ctx.has_initial = size, initial is not None
        ctx.set_materialize_grads(False)
        return y.to(x.dtype), _narrow(states[:, c], h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dfinal):  # type: ignore[override]
        x, dt, A, B, C, D, starts, y, states = ctx.saved_tensors
        b, length, h, p = x.shape
        g = B.shape[2]
        size, dtype = ctx.size, states.dtype
        c = length // size
        dy = torch.zeros_like(x) if dy is None else dy
        xs, ys, dys = (t.reshape(b, c, size, h, p) for t in (x, y, dy))
        Bs, Cs = (_by_group(t, c, dtype) for t in (B, C))
        decay = _decays(dt, A, starts, c, g, p, dtype)
        dx, dB, dC = torch.empty_like(xs, dtype=dtype), torch.empty_like(Bs), torch.empty_like(Cs)
        x_dx, dy_y = torch.empty_like(decay.dt), torch.empty_like(decay.dt)
        dwhole = x.new_empty(b, c, h, dtype=dtype)
        dD = x.new_zeros(h, p, dtype=dtype)
        # the gradient of the state that leaves the chunk at hand; in the end that of the initial state
        dstate = torch.zeros_like(states[:, 0]) if dfinal is None else _wide(dfinal.to(dtype), g).contiguous()
        for rows, chunks in reversed(list(_blocks(b, c, h, size, x.device))):
            k = (rows, chunks)
            xk, dyk, Bk, Ck = xs[k].to(dtype), dys[k].to(dtype), Bs[k], Cs[k]
            weight = decay.to_end[k].unsqueeze(-1)

            # between chunks: the recurrence backwards
            dyw = _heads_together(dyk * decay.from_start[k].unsqueeze(-1), g)
            dbefore = Ck.mT @ dyw
            dafter = torch.empty_like(dbefore)
            for i, chunk in reversed(list(enumerate(range(chunks.start, chunks.stop)))):
                dafter[:, i] = dstate[rows]
                torch.addcmul(dbefore[:, i], dafter[:, i], decay.whole[rows, chunk], out=dstate[rows])
            after = states[rows, chunks.start + 1 : chunks.stop + 1]
            dwhole[k] = (dafter * after).sum(3).unflatten(-1, (h // g, p)).sum(-1).flatten(2)

            # within chunks
            tile = xk.new_empty(*xk.shape[:2], h, size, size)
            fill_tile(tile, decay.target[k], decay.source[k])
            mixing = tile.unflatten(2, (g, -1)) * (Ck @ Bk.mT).tril_().unsqueeze(3)
            xh, dyh = xk.transpose(2, 3), dyk.transpose(2, 3).contiguous()
            within = (mixing.flatten(2, 3).mT @ dyh).transpose(2, 3)
            dCB = torch.matmul(dyh, xh.mT, out=mixing.flatten(2, 3)).mul_(tile).unflatten(2, (g, -1)).sum(3).tril_()

            dC[k] = dyw @ states[k].mT + dCB @ Bk
            dB[k] = _heads_together(xk * weight, g) @ dafter.mT + dCB.mT @ Ck
            dxk = torch.addcmul(within, _heads_apart(Bk @ dafter, h), weight, out=dx[k])
            x_dx[k] = _dot(xk, dxk)
            dy_y[k] = _dot(dyk, ys[k])
            if D is not None:
                skip = dyk * _per_channel(D)
                dy_y[k] -= _dot(xk, skip)
                dxk += skip
                dD += (dyk * xk).sum((0, 1, 2))
        dlog = dy_y.sub_(x_dx)
        dlog[:, :, -1] += dwhole
        dlog = dlog.flip(2).cumsum(2).flip(2)
        ddt = x_dx.div_(decay.dt).addcmul_(dlog, A.to(dtype))
        dA = (dlog * dt.view_as(dlog)).sum((0, 1, 2))
        return (
            dx.view(x.shape).to(x.dtype),
            ddt.view(dt.shape).to(dt.dtype),
            dA.to(A.dtype),
            dB.transpose(2, 3).reshape(B.shape).to(B.dtype),
            dC.transpose(2, 3).reshape(C.shape).to(C.dtype),
            None if D is None else (dD if D.dim() == 2 else dD.sum(-1)).to(D.dtype),
            _narrow(dstate, h) if ctx.has_initial else None,
            None,
            None,
        )


def _decays(dt: Tensor, A: Tensor, starts: Tensor | None, c: int, g: int, p: int, dtype: torch.dtype) -> Decays:
    chunked = None if starts is None else starts.unflatten(1, (c, -1))
    return decays(dt.unflatten(1, (c, -1)), A, chunked, g, p, dtype)


def _blocks(b: int, c: int, h: int, size: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the chunks, in order of time: rows one by one on a CPU, all at once on a GPU."""
    rows = 1 if device.type == "cpu" else b
    for row in range(0, b, rows):
        for chunks in blocks(c, rows * h * size * size, device):
            yield slice(row, row + rows), chunks


def _by_group(t: Float[Tensor, "b l g n"], c: int, dtype: torch.dtype) -> Float[Tensor, "b c g L n"]:
    return t.unflatten(1, (c, -1)).transpose(2, 3).to(dtype)


def _heads_together(t: Float[Tensor, "b c L h p"], g: int) -> Float[Tensor, "b c g L rp"]:
    """The channels of a group's heads side by side: one wide matrix product instead of r narrow ones."""
    return t.view(*t.shape[:3], g, -1).transpose(2, 3)


def _heads_apart(t: Float[Tensor, "b c g L rp"], h: int) -> Float[Tensor, "b c L h p"]:
    return t.transpose(2, 3).reshape(t.shape[0], t.shape[1], t.shape[3], h, -1)


def _wide(state: Float[Tensor, "b h p n"], g: int) -> Float[Tensor, "b g n rp"]:
    return state.reshape(state.shape[0], g, -1, state.shape[-1]).mT


def _narrow(state: Float[Tensor, "b g n rp"], h: int) -> Float[Tensor, "b h p n"]:
    return state.mT.reshape(state.shape[0], h, -1, state.shape[2])


def _per_channel(D: Float[Tensor, "h"] | Float[Tensor, "h p"]) -> Float[Tensor, "h #p"]:
    return D if D.dim() == 2 else D.unsqueeze(-1)


def _dot(a: Float[Tensor, "*k p"], b: Float[Tensor, "*k p"]) -> Float[Tensor, "*k"]:
    """Sums over the last axis, as a matrix product: torch's own sum over a short axis is slow on a CPU."""
    product = a * b
    return (product.view(-1, product.shape[-1]) @ product.new_ones(product.shape[-1])).view(product.shape[:-1])
